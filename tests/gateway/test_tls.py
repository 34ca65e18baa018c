"""TLS: https to the gateway, also to that of `tritonlm serve`, and TLS to Triton; the test creates the certificate."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
import uvicorn
from fakes.fake_transport import LM, FakeTransport
from fakes.ports import free_ports, port_options
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm import AsyncClient
from tritonlm.cli import app as command_line
from tritonlm.gateway.app import create_app
from tritonlm.gateway.http.protocol import BoundedProtocol
from tritonlm.gateway.settings import GatewaySettings
from tritonlm.serving import supervisor
from tritonlm.serving.placeholder import PlaceholderListener
from typer.testing import CliRunner

from .conftest import WAIT_SECONDS, wait_until_started

HEALTH_CHECK = Path(__file__).parents[2] / "docker" / "healthcheck"


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


def test_a_starting_server_says_so_over_https(certificate: tuple[Path, Path]) -> None:
    """Until the gateway listens; connections that send nothing, or plain http, hold up no other one."""
    path, key = certificate
    settings = GatewaySettings(tls_certificate=path, tls_key=key)
    (port,) = free_ports(1)
    trusted = ssl.create_default_context(cafile=path)
    with PlaceholderListener("127.0.0.1", port, settings.tls_context()), socket.create_connection(("127.0.0.1", port)):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False, timeout=WAIT_SECONDS)
        with httpx.Client(verify=trusted, trust_env=False, timeout=WAIT_SECONDS) as http:
            body = {"prompt": "a" * 100_000}
            answers = [http.post(f"https://127.0.0.1:{port}/v1/completions", json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503] * 3
    assert "starting" in answers[0].json()["error"]["message"]


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


def test_serve_starts_a_gateway_with_https(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real gateway, the child of a supervisor whose Triton is a fake."""
    path, key = certificate
    ports = port_options()
    statuses: list[int] = []

    class Monitor:
        watchdog = None

        def __init__(self, *_: object) -> None:
            pass

        def run(self) -> None:
            trusted = ssl.create_default_context(cafile=path)
            url = f"https://127.0.0.1:{ports['port']}/health/live"
            statuses.append(httpx.get(url, verify=trusted, trust_env=False, timeout=WAIT_SECONDS).status_code)
            raise supervisor.StopRequested

    triton = SimpleNamespace(log=None, stop=lambda: None)
    monkeypatch.setattr(supervisor, "prepare", lambda *_: triton)
    monkeypatch.setattr(supervisor, "start", lambda *_: {"abacus": {}})
    monkeypatch.setattr(supervisor, "Monitor", Monitor)
    monkeypatch.setattr(supervisor, "drain", lambda *_: None)
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    options = [word for name, port in ports.items() for word in (f"--{name}", port)]
    environment = {"TRITONLM_TLS_CERTIFICATE": str(path), "TRITONLM_TLS_KEY": str(key)}
    result = CliRunner().invoke(command_line, ["serve", "--load", "abacus", *options], env=environment)
    assert (result.exit_code, statuses) == (0, [200]), result.output
    url = f"https://127.0.0.1:{ports['port']}"
    for text in (f"API      {url}/v1", f"try it   {url}/playground", f"curl {url}/v1/completions"):
        assert text in result.stdout


@pytest.mark.parametrize("command", ["gateway", "serve"])
def test_files_that_are_no_certificate_are_refused_in_one_line(
    certificate: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    """Before any process starts."""
    path, key = certificate
    text, encrypted = tmp_path / "text.pem", tmp_path / "encrypted.pem"
    text.write_text("hello")
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", str(key), "-out", str(encrypted)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    for own_certificate, own_key in ((text, key), (path, encrypted)):
        environment = {"TRITONLM_TLS_CERTIFICATE": str(own_certificate), "TRITONLM_TLS_KEY": str(own_key)}
        ran = subprocess.run(
            [sys.executable, "-m", "tritonlm", command, "--port", str(free_ports(1)[0])],
            env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ran.returncode == 2
        (line,) = ran.stderr.splitlines()
        assert line.startswith(f"error: --tls-certificate {own_certificate}, --tls-key {own_key}: not a certificate")


@pytest.mark.parametrize("with_tls", [False, True])
def test_the_health_check_of_a_container_follows_the_gateway_to_https(
    certificate: tuple[Path, Path], with_tls: bool
) -> None:
    path, key = certificate
    with ready_server(certificate if with_tls else None) as port:
        environment = {**os.environ, "TRITONLM_PORT": str(port)}
        if with_tls:
            environment |= {"TRITONLM_TLS_CERTIFICATE": str(path), "TRITONLM_TLS_KEY": str(key)}
        subprocess.run(["sh", str(HEALTH_CHECK)], env=environment, check=True, timeout=60)
    assert subprocess.run(["sh", str(HEALTH_CHECK)], env=environment, check=False, timeout=60).returncode == 1


@contextlib.contextmanager
def ready_server(certificate: tuple[Path, Path] | None) -> Iterator[int]:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
