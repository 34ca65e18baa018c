"""The gateway's application: settings and a client in, an ASGI app out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

import tritonlm
from tritonlm.access.keys import KeyFile, KeyRing
from tritonlm.client.async_client import AsyncClient
from tritonlm.observability.tracing import Tracing
from tritonlm.serving.repairs import read_repairs

from . import errors
from .access import Access
from .admission import Admission
from .history import History
from .loading import Loader
from .metrics import Looks
from .middleware import REQUEST_ID, Surroundings
from .quota import Allowance
from .routes import jobs, models, older, openai, playground, tools, usage
from .settings import GatewaySettings
from .training import Training


def create_app(client: AsyncClient, settings: GatewaySettings) -> FastAPI:
    training = Training(settings)
    ring, allowance = key_ring(settings), Allowance(settings.limits_storage)
    admission = Admission(
        settings.max_requests, settings.max_running, settings.queue_seconds, settings.max_prompt_tokens
    )

    tracing = Tracing(settings.otlp_endpoint, "tritonlm-gateway") if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await training.start()
        app.state.loader.start()
        yield
        await training.close()
        await app.state.loader.close()
        await client.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPIOffline(
        redoc_url=None,
        title="tritonlm",
        version=tritonlm.__version__,
        description="Language models on Triton, with OpenAI's API.",
        lifespan=lifespan,
    )
    app.state.settings, app.state.history, app.state.admission = settings, History(), admission
    app.state.looks = Looks(
        running=admission.running.total,
        waiting=lambda: admission.waiting,
        limit=settings.max_requests,
        jobs=training.counts,
        repairs=lambda: read_repairs(settings.repairs),
    )
    app.state.loader = Loader(client, settings)
    client.revive = app.state.loader.revive
    errors.install(app)
    app.include_router(openai.router(client, settings))
    app.include_router(older.router(client, settings, training))
    app.include_router(jobs.router(training))
    app.include_router(models.router(client, training))
    app.include_router(tools.router(client, settings))
    app.include_router(usage.router(allowance))
    app.include_router(playground.router())
    app.add_middleware(Access, settings=settings, ring=ring, allowance=allowance, admission=admission)
    if settings.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID],
            expose_headers=[REQUEST_ID],
        )
    app.add_middleware(Surroundings, max_body_bytes=settings.max_body_bytes, tracing=tracing)
    return app


def key_ring(settings: GatewaySettings) -> KeyRing:
    secret = settings.api_key.get_secret_value() if settings.api_key else None
    return KeyRing(KeyFile(settings.keys) if settings.keys else None, secret)
