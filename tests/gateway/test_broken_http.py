"""Malformed HTTP, endless heads, silent connections and bodies: the gateway responds or closes, and keeps serving."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator

import pytest
from fakes.fake_transport import LM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive
from tritonlm.gateway.http import protocol
from tritonlm.gateway.http.middleware import RequestMiddleware

from .conftest import WAIT_SECONDS, Gateway, running_gateway

GOOD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"model": "fake", "prompt": "a"}'


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with running_gateway(max_body_bytes=20_000) as running:
        yield running


def exchange(gateway: Gateway, *parts: bytes, end: bool = True) -> bytes:
    """Send the parts and return all bytes until the gateway closes the connection."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as connection:
        response = b""
        try:
            for part in parts:
                connection.sendall(part)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while block := connection.recv(65536):
                response += block
        except ConnectionError:
            # The gateway closed it. A timeout would fail the test.
            pass
        return response


def is_serving(gateway: Gateway) -> bool:
    return gateway.post("/v1/completions", model=LM, prompt="a", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"HELLO WORLD\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        GOOD + b"Content-Length: banana\r\n\r\n" + BODY, GOOD + b"Content-Length: -5\r\n\r\n" + BODY,
        GOOD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", GOOD + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
        GOOD + b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        GOOD + b"Bad Header: x\r\n\r\n", GOOD + b"X: a\x00b\r\n\r\n",
        b"GET /%00%ff%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GOOD + b"Content-Length: 1000\r\n\r\n{", GOOD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    ],
)  # fmt: skip
def test_malformed_http_is_answered_or_closed(gateway: Gateway, sent: bytes) -> None:
    response = exchange(gateway, sent)
    assert not response or response.startswith((b"HTTP/1.1 4", b"HTTP/1.1 100"))
    assert b"Traceback" not in response
    assert is_serving(gateway)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=1, max_size=400), st.booleans())
def test_random_bytes_cause_no_server_error(gateway: Gateway, sent: bytes, behind_a_head: bool) -> None:
    head = GOOD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(sent) if behind_a_head else b""
    response = exchange(gateway, head + sent)
    assert not response.startswith(b"HTTP/1.1 5")
    assert b"Traceback" not in response


@pytest.mark.parametrize("endless", [b"X-Long: " + b"a" * 200_000, b"X: a\r\n" * 40_000, b"GET /" + b"a" * 200_000])
def test_an_endless_head_is_closed(gateway: Gateway, endless: bytes) -> None:
    response = exchange(gateway, (b"" if endless.startswith(b"GET") else b"GET / HTTP/1.1\r\n") + endless, end=False)
    assert not response or response.startswith(b"HTTP/1.1 400")
    assert is_serving(gateway)


def test_a_silent_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with running_gateway() as gateway:
        for begun in (b"", b"GET / HT"):
            assert exchange(gateway, begun, end=False) == b""
        # A long response does not count as a long head.
        gateway.transport.pause = 0.3
        body = {"model": LM, "prompt": "a", "max_tokens": 40, "stream": True}
        with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            assert "[DONE]" in response.read().decode()
        # The time starts again for the next request on a kept-alive connection.
        time.sleep(0.1)
        gateway.transport.pause = 0.0
        assert is_serving(gateway)


@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/messages", b"/api/load_model"])
def test_a_body_that_does_not_arrive_is_refused(path: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    head = GOOD.replace(b"/v1/completions", path) + b"Content-Length: 100\r\n\r\n"
    with running_gateway() as gateway:
        for begun in (b"", b'{"model": '):
            response = exchange(gateway, head + begun, end=False)
            assert response.startswith(b"HTTP/1.1 408")
            error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
            assert error["message"] == "the body did not arrive in time"
        assert is_serving(gateway)


def test_a_request_holds_no_slot_before_its_body_is_in() -> None:
    with running_gateway(max_running=1, max_requests=1) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as silent:
            silent.sendall(GOOD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
            # The gateway waits for the body now.
            assert silent.recv(100).startswith(b"HTTP/1.1 100")
            assert is_serving(gateway)
            silent.sendall(BODY)
            assert silent.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("parts", "status"), [(1000, 408), (3, 200)])
def test_a_body_in_small_parts_is_limited_in_time_as_a_whole_and_the_wait_after_it_is_not(
    parts: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.4)

    async def receive_all() -> int:
        sent = 0

        async def receive() -> Message:
            nonlocal sent
            sent += 1
            if sent > parts:
                await asyncio.sleep(1.0)
                return {"type": "http.disconnect"}
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b"a", "more_body": sent < parts}

        async def app(_: object, limited: Receive, __: object) -> None:
            while (await limited())["type"] != "http.disconnect":
                pass

        async def send(_: Message) -> None:
            raise AssertionError("nothing is sent")

        scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": []}
        try:
            await RequestMiddleware(app, 2000, 2000)(scope, receive, send)
        except HTTPException as error:
            return error.status_code
        return 200

    assert asyncio.run(asyncio.wait_for(receive_all(), WAIT_SECONDS)) == status
