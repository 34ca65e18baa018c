"""Runs the gateway in this process until a signal; running requests get their time to end.

At the first signal it is no longer ready and refuses new requests, still listening; it ends when the last running one
has ended, or when their time is up, or at a second signal.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from types import FrameType

import uvicorn
from limits.errors import ConfigurationError
from sse_starlette.sse import AppStatus

from tritonlm.client.async_client import AsyncClient
from tritonlm.contract.priority import step_back
from tritonlm.observability import logs, tracing
from tritonlm.serving import ServingError, paths

from .admission import Admission
from .app import create_app, key_ring
from .metrics import Counting
from .protocol import BoundedProtocol
from .quota import Allowance
from .settings import GatewaySettings

_POLL_SECONDS = 0.05


def serve(settings: GatewaySettings) -> None:
    """ServingError says why serving cannot begin."""
    settings = settings.model_copy(update={"keys": settings.keys or paths.keys()})
    check_door(settings)
    step_back()
    logs.configure(settings.log_format)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal once more after its orderly end, for whoever else may wait for it: nobody does.
        signal.signal(number, lambda *_: None)
    asyncio.run(_serve(settings))


def check_door(settings: GatewaySettings) -> None:
    """Without a key only this machine is served, unless somebody has said otherwise."""
    try:
        Allowance(settings.limits_storage)
    except ConfigurationError as error:
        raise ServingError(
            f"--limits-storage {settings.limits_storage}: {error} (pip install 'tritonlm[redis]')"
        ) from None
    if settings.otlp_endpoint and not tracing.is_possible():
        raise ServingError("--otlp-endpoint: the library for traces is not here (pip install 'tritonlm[otel]')")
    ring = key_ring(settings)
    if ring.trouble:
        raise ServingError(ring.trouble)
    if ring.is_empty and not settings.allow_anonymous and not is_loopback(settings.host):
        raise ServingError(
            f"listening on {settings.host} without a key would let anybody in; make one with tritonlm keys create "
            "NAME, or say --allow-anonymous"
        )


def is_loopback(host: str) -> bool:
    """Whether every address of this host is this machine's own."""
    try:
        found = {ipaddress.ip_address(about[4][0]) for about in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(address.is_loopback for address in found)


async def _serve(settings: GatewaySettings) -> None:
    # By itself that library ends every stream at the signal; uvicorn gives them their time instead.
    AppStatus.enable_automatic_graceful_drain = False
    # Each Triton is asked once; more is the caller's: a gateway that tried again would hide full queues.
    client = AsyncClient(
        settings.triton,
        timeout=settings.request_seconds,
        max_retries=len(settings.triton) - 1,
        repair_seconds=settings.repair_seconds,
        authorities=settings.triton_authorities,
        observer=Counting(),
    )
    app = create_app(client, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        # The middleware writes one line per request itself.
        access_log=False,
        # Longer than clients keep idle connections: else one is closed at the moment in which it is used again.
        timeout_keep_alive=75,
        # What is left when the drain is over has had its time.
        timeout_graceful_shutdown=1,
        server_header=False,
        http=BoundedProtocol,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    sockets = [_opened(descriptor) for descriptor in settings.listening_fd]
    if settings.ready_fd is not None:
        _check_open(settings.ready_fd)
    server = _Server(config, app.state.admission, settings.drain_seconds, settings.ready_fd)
    await server.serve(sockets or None)


def _opened(descriptor: int) -> socket.socket:
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise ServingError(f"--listening-fd {descriptor}: {error.strerror}; name a socket that was handed on") from None


def _check_open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError as error:
        raise ServingError(f"--ready-fd {descriptor}: {error.strerror}; name one that was handed on") from None


class _Server(uvicorn.Server):
    """uvicorn stops listening at the first signal; here who comes late is told so."""

    def __init__(
        self, config: uvicorn.Config, admission: Admission, drain_seconds: float, ready_fd: int | None
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
        # In a signal handler nothing but this is safe.
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while self._admission.total and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True
