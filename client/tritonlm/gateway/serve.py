"""Runs the gateway in this process until a signal, then drains it.

After the first signal it is not ready and refuses new requests while it still listens. It ends when the last running
request has ended, after the drain time, or at a second signal. This module knows sockets and signals, no routes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from limits.errors import ConfigurationError
from sse_starlette.sse import AppStatus

from tritonlm.access.exposure import exposure_problem
from tritonlm.client.async_client import AsyncClient
from tritonlm.contract.priority import lower_thread_priority
from tritonlm.observability import logs, tracing
from tritonlm.serving import ServingError, paths

from .app import create_app
from .http.protocol import BoundedProtocol
from .limits.admission import AdmissionQueue
from .limits.quota import Quota
from .metrics import MetricsObserver
from .settings import GatewaySettings

_POLL_SECONDS = 0.05


def serve(settings: GatewaySettings) -> None:
    """Raises ServingError if the settings do not allow serving."""
    defaults = {"keys": settings.keys or paths.keys(), "adapters_folder": settings.adapters_folder or paths.adapters()}
    settings = settings.model_copy(update=defaults)
    check_settings(settings)
    lower_thread_priority()
    logs.configure(settings.log_format)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again after its shutdown; ignore it.
        signal.signal(number, lambda *_: None)
    asyncio.run(_serve(settings))


def check_settings(settings: GatewaySettings) -> None:
    """Check optional libraries and keys. Without a key only loopback is allowed, unless `allow_anonymous` is set."""
    try:
        Quota(settings.limits_storage)
    except ConfigurationError as error:
        raise ServingError(
            f"--limits-storage {settings.limits_storage}: {error} (pip install 'tritonlm[redis]')"
        ) from None
    if settings.otlp_endpoint and not tracing.is_available():
        raise ServingError("--otlp-endpoint needs the OpenTelemetry library (pip install 'tritonlm[otel]')")
    secret = settings.api_key.get_secret_value() if settings.api_key else None
    if problem := exposure_problem(settings.host, settings.keys, secret, settings.allow_anonymous):
        raise ServingError(problem)


async def _serve(settings: GatewaySettings) -> None:
    # sse_starlette would end every stream at the signal; uvicorn drains them instead.
    AppStatus.enable_automatic_graceful_drain = False
    # Each Triton is tried once. More retries are the caller's choice; here they would hide full queues.
    client = AsyncClient(
        settings.triton,
        timeout=settings.request_seconds,
        max_retries=len(settings.triton) - 1,
        repair_seconds=settings.repair_seconds,
        authorities=settings.triton_authorities,
        observer=MetricsObserver(),
    )
    app = create_app(client, settings)
    sockets = [_open_socket(descriptor) for descriptor in settings.listening_fd]
    if settings.ready_fd is not None:
        _check_open(settings.ready_fd)
    admission = app.state.services.admission
    server = _Server(_uvicorn_config(app, settings), admission, settings.drain_seconds, settings.ready_fd)
    await server.serve(sockets or None)


def _uvicorn_config(app: FastAPI, settings: GatewaySettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        # The middleware writes one line per request itself.
        access_log=False,
        # Longer than clients keep idle connections, so that a connection is not closed while it is being reused.
        timeout_keep_alive=75,
        # Requests that are left after the drain are cancelled.
        timeout_graceful_shutdown=1,
        server_header=False,
        http=BoundedProtocol,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )


def _open_socket(descriptor: int) -> socket.socket:
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise ServingError(f"--listening-fd {descriptor}: {error.strerror}; name an inherited socket") from None


def _check_open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError as error:
        raise ServingError(f"--ready-fd {descriptor}: {error.strerror}; name an inherited descriptor") from None


class _Server(uvicorn.Server):
    """uvicorn stops listening at the first signal; this server still listens and refuses requests with an error."""

    def __init__(
        self, config: uvicorn.Config, admission: AdmissionQueue, drain_seconds: float, ready_fd: int | None
    ) -> None:
        super().__init__(config)
        self._admission, self._drain_seconds, self._ready_fd = admission, drain_seconds, ready_fd
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready_fd is not None:
            os.close(self._ready_fd)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._admission.closed or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._admission.close()
        # The only call that is safe in a signal handler.
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while self._admission.total and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True
