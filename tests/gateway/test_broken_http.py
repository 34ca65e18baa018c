"""Bytes that are no HTTP, heads without end, connections that say nothing: an answer or a close, and life goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from fakes.fake_transport import LM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonlm.gateway import protocol

from .conftest import WAIT_SECONDS, Gateway, running_gateway

GOOD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"model": "fake", "prompt": "a"}'


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with running_gateway(max_body_bytes=20_000) as found:
        yield found


def exchange(gateway: Gateway, *parts: bytes, end: bool = True) -> bytes:
    """What comes back until the other side closes."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as made:
        told = b""
        try:
            for part in parts:
                made.sendall(part)
            if end:
                made.shutdown(socket.SHUT_WR)
            while piece := made.recv(65536):
                told += piece
        except ConnectionError:
            # Cut: a timeout would be a failure.
            pass
        return told


def lives(gateway: Gateway) -> bool:
    return gateway.post("/v1/completions", model=LM, prompt="a", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"HELLO WORLD\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        GOOD + b"Content-Length: banana\r\n\r\n" + BODY, GOOD + b"Content-Length: -5\r\n\r\n" + BODY,
        GOOD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", GOOD + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
        GOOD + b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        GOOD + b"Bad Header: x\r\n\r\n", GOOD + b"X: a\x00b\r\n\r\n", b"GET /%00%ff%zz HTTP/1.1\r\nHost: x\r\n\r\n",
        GOOD + b"Content-Length: 1000\r\n\r\n{", GOOD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    ],
)  # fmt: skip
def test_what_is_no_http_is_answered_or_cut(gateway: Gateway, sent: bytes) -> None:
    told = exchange(gateway, sent)
    assert not told or told.startswith((b"HTTP/1.1 4", b"HTTP/1.1 100"))
    assert b"Traceback" not in told
    assert lives(gateway)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=1, max_size=400), st.booleans())
def test_any_bytes_are_survived(gateway: Gateway, sent: bytes, behind_a_head: bool) -> None:
    head = GOOD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(sent) if behind_a_head else b""
    told = exchange(gateway, head + sent)
    assert not told.startswith(b"HTTP/1.1 5")
    assert b"Traceback" not in told


@pytest.mark.parametrize("endless", [b"X-Long: " + b"a" * 200_000, b"X: a\r\n" * 40_000, b"GET /" + b"a" * 200_000])
def test_a_head_without_end_is_cut(gateway: Gateway, endless: bytes) -> None:
    told = exchange(gateway, (b"" if endless.startswith(b"GET") else b"GET / HTTP/1.1\r\n") + endless, end=False)
    assert not told or told.startswith(b"HTTP/1.1 400")
    assert lives(gateway)


def test_who_says_nothing_is_cut_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with running_gateway() as gateway:
        for begun in (b"", b"GET / HT"):
            assert exchange(gateway, begun, end=False) == b""
        # A long answer is no long head.
        gateway.transport.pause = 0.3
        body = {"model": LM, "prompt": "a", "max_tokens": 40, "stream": True}
        with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            assert "[DONE]" in response.read().decode()
        # And a connection that is kept has its time anew.
        time.sleep(0.1)
        gateway.transport.pause = 0.0
        assert lives(gateway)
