"""The reception: the gateway's port from the command's first moment until somebody takes over."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tritonlm.cli import app
from tritonlm.serving import ServingError
from tritonlm.serving.placeholder import Reception
from typer.testing import CliRunner

SECONDS = 20.0


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def reception(port: int) -> Iterator[Reception]:
    with Reception("127.0.0.1", port) as opened:
        yield opened


def ask(port: int, method: str = "GET", path: str = "/health/ready", body: bytes = b"") -> httpx.Response:
    return httpx.request(
        method, f"http://127.0.0.1:{port}{path}", content=body or None, trust_env=False, timeout=SECONDS
    )


def test_whoever_asks_hears_that_it_is_not_ready(reception: Reception, port: int) -> None:
    for method, path, body in (
        ("GET", "/health/ready", b""),
        ("GET", "/no/such/url", b""),
        ("POST", "/v1/completions", b"x" * 500_000),
        ("DELETE", "/v1/models/fable", b""),
    ):
        response = ask(port, method, path, body)
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "1"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "unavailable")
        assert "starting" in error["message"]
    assert ask(port, "HEAD").content == b""


def test_nobody_keeps_the_others_waiting(reception: Reception, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as rude:
        rude.sendall(b"nonsense\r\n\r\n")
        with ThreadPoolExecutor(8) as callers:
            found = [answer.status_code for answer in callers.map(lambda _: ask(port), range(40))]
    assert found == [503] * 40


def test_who_comes_after_the_handing_over_waits_for_whoever_took_over(reception: Reception, port: int) -> None:
    (descriptor,), baton = reception.sockets, reception.baton
    assert baton is not None
    # As a child does: its own copies of both.
    taken, held = socket.socket(fileno=os.dup(descriptor)), os.dup(baton)
    reception.let_go()
    assert ask(port).status_code == 503
    os.close(held)
    reception._attending.join(SECONDS)
    assert reception.baton is None
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(ask, port)
        taken.settimeout(SECONDS)
        with taken, taken.accept()[0] as connection:
            assert connection.recv(1000).startswith(b"GET /health/ready")
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            assert answer.result(SECONDS).text == "ok"


def test_after_its_end_nobody_listens(port: int) -> None:
    with Reception("127.0.0.1", port) as reception:
        reception.stop()
    with pytest.raises(httpx.ConnectError):
        ask(port)


def test_localhost_is_all_its_addresses(port: int) -> None:
    with Reception("localhost", port):
        for address in {about[4][0] for about in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}:
            host = f"[{address}]" if ":" in str(address) else address
            assert httpx.get(f"http://{host}:{port}/", trust_env=False, timeout=SECONDS).status_code == 503


def test_a_port_in_use_is_told_with_its_remedy(reception: Reception, port: int) -> None:
    with pytest.raises(ServingError, match=rf"port {port} \(the gateway\) on 127.0.0.1 is in use; .*--port"):
        Reception("127.0.0.1", port)


@pytest.mark.parametrize("option", ["--listening-fd", "--ready-fd"])
def test_a_descriptor_that_nobody_handed_on_is_told(option: str, port: int) -> None:
    found = CliRunner().invoke(app, ["gateway", "--port", str(port), option, "999"])
    assert found.exit_code == 2
    assert f"error: {option} 999: Bad file descriptor; name" in found.stderr
