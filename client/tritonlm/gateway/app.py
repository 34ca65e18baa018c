"""Builds the gateway's ASGI application from settings and a client. It does not know where that listens (`serve`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

import tritonlm
from tritonlm.access.keys import KeyFile, KeyRing
from tritonlm.client.async_client import AsyncClient
from tritonlm.observability.tracing import Tracing
from tritonlm.serving.restart_counts import read_restart_counts

from .batches.runner import BatchRunner
from .batches.store import BatchStore
from .history import History
from .http import errors, origins
from .http.middleware import InternalErrorMiddleware, RequestMiddleware
from .limits.access import AccessMiddleware
from .limits.admission import AdmissionQueue
from .limits.quota import Quota
from .metrics import LiveValues
from .models.adapters import AdapterService
from .models.loading import Loader
from .models.training import TrainingService
from .response_store import ResponseStore
from .routes import ROUTERS
from .services import Services
from .settings import GatewaySettings


def create_app(client: AsyncClient, settings: GatewaySettings) -> FastAPI:
    client.names.folder = settings.adapters_folder
    services = _create_services(client, settings)
    runner: BatchRunner | None = None
    tracing = Tracing(settings.otlp_endpoint, "tritonlm-gateway") if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.training.start()
        if runner is not None:
            runner.start()
        services.loader.start()
        yield
        if runner is not None:
            await runner.close()
        await services.training.close()
        await services.loader.close()
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
    app.state.services = services
    client.revive = services.loader.revive
    errors.install(app)
    # `include_router` would make a second copy of every route: a sixth of the gateway's start.
    for router in ROUTERS:
        app.router.routes.extend(router.routes)
    ring = key_ring(settings)
    _add_middleware(app, services, ring, tracing)
    if services.batches is not None:
        runner = BatchRunner(services.batches, app, services.admission, ring.is_valid, settings.batch_requests)
    return app


def _create_services(client: AsyncClient, settings: GatewaySettings) -> Services:
    training = TrainingService(settings)
    admission = AdmissionQueue(
        settings.max_requests, settings.max_running, settings.queue_seconds, settings.max_prompt_tokens
    )
    batches = _batch_store(settings)
    live_values = LiveValues(
        running=admission.running.total,
        waiting=lambda: admission.waiting,
        limit=settings.max_requests,
        jobs=training.counts,
        batches=batches.counts if batches else dict,
        repairs=lambda: read_restart_counts(settings.repairs),
    )
    return Services(
        client=client,
        settings=settings,
        adapters=AdapterService(client, settings.adapters_folder),
        admission=admission,
        history=History(),
        live_values=live_values,
        loader=Loader(client, settings),
        quota=Quota(settings.limits_storage),
        response_store=_response_store(settings),
        batches=batches,
        training=training,
    )


def _response_store(settings: GatewaySettings) -> ResponseStore | None:
    if settings.response_store is None:
        return None
    return ResponseStore(settings.response_store, settings.response_days, settings.response_store_bytes)


def _batch_store(settings: GatewaySettings) -> BatchStore | None:
    if settings.batch_folder is None:
        return None
    return BatchStore(settings.batch_folder, settings.batch_days, settings.batch_folder_bytes)


def _add_middleware(app: FastAPI, services: Services, ring: KeyRing, tracing: Tracing | None) -> None:
    """The middleware added last runs first."""
    settings = services.settings
    app.add_middleware(
        AccessMiddleware,
        settings=settings,
        ring=ring,
        quota=services.quota,
        admission=services.admission,
    )
    app.add_middleware(InternalErrorMiddleware)
    origins.install(app, settings, ring)
    app.add_middleware(
        RequestMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_file_bytes=settings.max_file_bytes,
        tracing=tracing,
    )


def key_ring(settings: GatewaySettings) -> KeyRing:
    secret = settings.api_key.get_secret_value() if settings.api_key else None
    return KeyRing(KeyFile(settings.keys) if settings.keys else None, secret)
