"""Runs the gateway in this process until a signal; running requests get their time to end."""

from __future__ import annotations

import asyncio
import logging
import signal

import uvicorn
from sse_starlette.sse import AppStatus

from tritonlm.client import AsyncClient
from tritonlm.contract.priority import step_back

from .app import create_app
from .settings import GatewaySettings


def serve(settings: GatewaySettings) -> None:
    step_back()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal once more after its orderly end, for whoever else may wait for it: nobody does.
        signal.signal(number, lambda *_: None)
    asyncio.run(_serve(settings))


async def _serve(settings: GatewaySettings) -> None:
    # By itself that library ends every stream at the signal; uvicorn gives them their time instead.
    AppStatus.enable_automatic_graceful_drain = False
    # Retries are the caller's: a gateway that tried again would hide a full queue and double the load.
    client = AsyncClient(settings.triton, timeout=settings.request_seconds, max_retries=0)
    config = uvicorn.Config(
        create_app(client, settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        # The middleware writes one line per request itself.
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        server_header=False,
    )
    await uvicorn.Server(config).serve()
