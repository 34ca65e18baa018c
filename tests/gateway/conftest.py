"""A gateway on a real socket, with a fake transport instead of Triton."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from fakes.fake_transport import FakeTransport
from tritonlm import AsyncClient
from tritonlm.gateway.app import create_app
from tritonlm.gateway.http.protocol import BoundedProtocol
from tritonlm.gateway.metrics import MetricsObserver
from tritonlm.gateway.settings import GatewaySettings

WAIT_SECONDS = 20.0
# A fuzzed name may look like a model of the Hub; no test asks the real one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass
class Gateway:
    url: str
    http: httpx.Client
    transport: FakeTransport

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the condition was not met in time"
            time.sleep(0.005)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with running_gateway(max_body_bytes=20_000) as running:
        yield running


@contextlib.contextmanager
def running_gateway(transport: FakeTransport | None = None, **settings: Any) -> Iterator[Gateway]:
    transport = transport or FakeTransport()
    defaults: dict[str, Any] = {"cors_allow_origins": ["http://page.example"], "ping_seconds": 0.2}
    gateway_settings = GatewaySettings(**defaults | settings)
    app = create_app(AsyncClient(transports=[transport], max_retries=0, observer=MetricsObserver()), gateway_settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, http=BoundedProtocol))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until_started(server)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as http:
            yield Gateway(url, http, transport)
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)


def wait_until_started(server: uvicorn.Server) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not server.started:
        assert time.monotonic() < deadline, "the gateway does not start"
        time.sleep(0.005)
