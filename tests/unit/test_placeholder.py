"""The placeholder listener: replies 503 on the gateway's port until the gateway takes the sockets over."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tritonlm.cli import app
from tritonlm.serving import ServingError
from tritonlm.serving.placeholder import PlaceholderListener
from typer.testing import CliRunner

SECONDS = 20.0


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def placeholder(port: int) -> Iterator[PlaceholderListener]:
    with PlaceholderListener("127.0.0.1", port) as listener:
        yield listener


def send(port: int, method: str = "GET", path: str = "/health/ready", body: bytes = b"") -> httpx.Response:
    return httpx.request(
        method, f"http://127.0.0.1:{port}{path}", content=body or None, trust_env=False, timeout=SECONDS
    )


def test_every_request_gets_a_503(placeholder: PlaceholderListener, port: int) -> None:
    for method, path, body in (
        ("GET", "/health/ready", b""),
        ("GET", "/no/such/url", b""),
        ("POST", "/v1/completions", b"x" * 500_000),
        ("DELETE", "/v1/models/fable", b""),
    ):
        response = send(port, method, path, body)
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "1"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "unavailable")
        assert "starting" in error["message"]
    assert send(port, "HEAD").content == b""


def test_idle_and_invalid_connections_do_not_block_others(placeholder: PlaceholderListener, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as invalid:
        invalid.sendall(b"nonsense\r\n\r\n")
        with ThreadPoolExecutor(8) as pool:
            statuses = [response.status_code for response in pool.map(lambda _: send(port), range(40))]
    assert statuses == [503] * 40


def test_a_request_after_the_handover_is_served_by_the_new_process(placeholder: PlaceholderListener, port: int) -> None:
    (socket_fd,), ready_fd = placeholder.socket_fds, placeholder.ready_fd
    assert ready_fd is not None
    # A child process has its own copies of both descriptors.
    inherited, inherited_ready_fd = socket.socket(fileno=os.dup(socket_fd)), os.dup(ready_fd)
    placeholder.release()
    assert send(port).status_code == 503
    os.close(inherited_ready_fd)
    placeholder._thread.join(SECONDS)
    assert placeholder.ready_fd is None
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(send, port)
        inherited.settimeout(SECONDS)
        with inherited, inherited.accept()[0] as connection:
            assert connection.recv(1000).startswith(b"GET /health/ready")
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            assert response.result(SECONDS).text == "ok"


def test_stop_closes_the_port(port: int) -> None:
    with PlaceholderListener("127.0.0.1", port) as placeholder:
        placeholder.stop()
    with pytest.raises(httpx.ConnectError):
        send(port)


def test_localhost_listens_on_all_its_addresses(port: int) -> None:
    with PlaceholderListener("localhost", port):
        for address in {info[4][0] for info in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}:
            host = f"[{address}]" if ":" in str(address) else address
            assert httpx.get(f"http://{host}:{port}/", trust_env=False, timeout=SECONDS).status_code == 503


def test_a_port_in_use_is_an_error_with_a_remedy(placeholder: PlaceholderListener, port: int) -> None:
    with pytest.raises(ServingError, match=rf"port {port} \(the gateway\) on 127.0.0.1 is in use; .*--port"):
        PlaceholderListener("127.0.0.1", port)


@pytest.mark.parametrize("option", ["--listening-fd", "--ready-fd"])
def test_an_unknown_descriptor_is_an_error(option: str, port: int) -> None:
    result = CliRunner().invoke(app, ["gateway", "--port", str(port), option, "999"])
    assert result.exit_code == 2
    assert f"error: {option} 999: Bad file descriptor; name" in result.stderr
