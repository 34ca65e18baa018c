"""The gateway as a process, in front of a real Triton: how it ends, and what it frees."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from .gateways import gateway_to, leave
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


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_frees_its_places_running_or_queued(
    small_server: Server, tmp_path: Path, stream: bool
) -> None:
    def counts() -> tuple[int, int]:
        status = small_server.status()
        return status["running"], status["waiting"]

    with gateway_to(small_server.grpc, tmp_path) as gateway, ThreadPoolExecutor(1) as other:
        before = small_server.status()["cancelled"]
        leave(gateway.url, {**LONG, "n": 3}, stream, lambda: wait_until(lambda: counts() == (3, 0), "all run"))
        wait_until(lambda: counts() == (0, 0), "none runs")
        assert small_server.status()["cancelled"] - before == 3
        # All places are taken by another caller, who goes on undisturbed while two that wait leave.
        taken = other.submit(httpx.post, f"{gateway.url}/v1/completions", json={**LONG, "n": 4}, timeout=60)
        wait_until(lambda: counts() == (4, 0), "all places are taken")
        leave(gateway.url, {**LONG, "n": 2}, stream, lambda: wait_until(lambda: counts() == (4, 2), "two wait"))
        wait_until(lambda: counts() == (4, 0) or taken.done(), "nobody waits")
        assert {choice["finish_reason"] for choice in taken.result().json()["choices"]} == {"length"}
        assert small_server.status()["cancelled"] - before == 5


def test_one_choice_that_fails_ends_the_others(small_server: Server, tmp_path: Path) -> None:
    """Four places and a queue of four: of ten choices two have no room, and the eight are not computed for nobody."""
    with gateway_to(small_server.grpc, tmp_path) as gateway:
        found = httpx.post(f"{gateway.url}/v1/completions", json={**LONG, "n": 10}, timeout=60)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        wait_until(small_server.holds_nothing, "the others are ended")
