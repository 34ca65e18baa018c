"""TLS: https to the gateway and TLS to Triton, with a certificate that the test creates."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from pathlib import Path

import grpc
import httpx
import pytest
import uvicorn
from fakes.fake_transport import LM, FakeTransport
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm import AsyncClient
from tritonlm.gateway.app import create_app
from tritonlm.gateway.protocol import BoundedProtocol
from tritonlm.gateway.settings import GatewaySettings

from .conftest import WAIT_SECONDS, wait_until_started


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    path, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(path)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return path, key


def test_https(certificate: tuple[Path, Path]) -> None:
    path, key = certificate
    settings = GatewaySettings(tls_certificate=path, tls_key=key)
    app = create_app(AsyncClient(transports=[FakeTransport()]), settings)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, http=BoundedProtocol,
        ssl_certfile=settings.tls_certificate, ssl_keyfile=settings.tls_key,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until_started(server)
    url = f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        trusted = ssl.create_default_context(cafile=path)
        with httpx.Client(verify=trusted, trust_env=False, timeout=WAIT_SECONDS) as http:
            body = {"model": LM, "prompt": "a", "max_tokens": 2}
            assert http.post(f"{url}/v1/completions", json=body).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)


def test_triton_over_tls(certificate: tuple[Path, Path]) -> None:
    path, key = certificate

    class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        async def ServerLive(self, request: object, context: object) -> object:  # noqa: N802 (the protocol's name)
            return service_pb2.ServerLiveResponse(live=True)

    async def ask() -> tuple[bool, bool, bool]:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(), server)
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), path.read_bytes())])
        port = server.add_secure_port("localhost:0", credentials)
        await server.start()
        live = []
        for url, authorities in (("grpcs://localhost", path), ("grpcs://localhost", None), ("localhost", None)):
            async with AsyncClient(f"{url}:{port}", authorities=authorities, connect_timeout=2) as client:
                live.append((await client.health()).live)
        await server.stop(0)
        return live[0], live[1], live[2]

    assert asyncio.run(asyncio.wait_for(ask(), 60)) == (True, False, False)
