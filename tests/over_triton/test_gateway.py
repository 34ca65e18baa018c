"""The gateway as a process, in front of a real Triton: how it ends, and what it frees."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import httpx
import pytest

from .gateways import gateway_to
from .servers import LM, WAIT_SECONDS, Server, wait_until

pytestmark = pytest.mark.triton

LONG = {"model": LM, "prompt": "Once", "temperature": 0, "max_tokens": 480, "ignore_eos": True}


def test_sigterm_to_the_gateway_alone_lets_its_streams_end(small_server: Server, tmp_path: Path) -> None:
    with gateway_to(small_server.grpc, tmp_path) as gateway, httpx.Client(trust_env=False, timeout=60) as http:
        with http.stream("POST", f"{gateway.url}/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            received = [next(lines)]
            gateway.process.terminate()
            received += list(lines)
        assert gateway.process.wait(WAIT_SECONDS) == 0
        events = [line.removeprefix("data: ") for line in received if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert "POST '/v1/completions' 200" in gateway.log.read_text()


def test_a_stream_that_outlasts_the_time_to_drain_is_cut_and_freed(small_server: Server, tmp_path: Path) -> None:
    with gateway_to(small_server.grpc, tmp_path, "--drain-seconds", "1") as gateway:
        with (
            httpx.Client(trust_env=False, timeout=60) as http,
            http.stream("POST", f"{gateway.url}/v1/completions", json={**LONG, "n": 4, "stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            gateway.process.terminate()
            with contextlib.suppress(httpx.TransportError):
                assert "data: [DONE]" not in list(lines)
        assert gateway.process.wait(WAIT_SECONDS) == 0
    wait_until(small_server.holds_nothing, "the engine is free again")
