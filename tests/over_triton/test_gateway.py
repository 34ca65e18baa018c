"""The gateway process with a real Triton: shutdown, and requests whose caller disconnects."""

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


def test_sigterm_to_the_gateway_lets_its_streams_finish(small_server: Server, tmp_path: Path) -> None:
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


def test_a_stream_that_exceeds_the_drain_time_is_cut_off(small_server: Server, tmp_path: Path) -> None:
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
    wait_until(small_server.holds_nothing, "the engine is idle again")


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_caller_frees_its_slots_and_queue_entries(
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
        # Another caller takes all slots and is not affected when two waiting requests disconnect.
        running = other.submit(httpx.post, f"{gateway.url}/v1/completions", json={**LONG, "n": 4}, timeout=60)
        wait_until(lambda: counts() == (4, 0), "all slots are taken")
        leave(gateway.url, {**LONG, "n": 2}, stream, lambda: wait_until(lambda: counts() == (4, 2), "two wait"))
        wait_until(lambda: counts() == (4, 0) or running.done(), "no request waits")
        assert {choice["finish_reason"] for choice in running.result().json()["choices"]} == {"length"}
        assert small_server.status()["cancelled"] - before == 5


def test_a_failed_choice_cancels_the_others(small_server: Server, tmp_path: Path) -> None:
    """Four slots and a queue of four: of ten choices two are refused, and the other eight are cancelled."""
    with gateway_to(small_server.grpc, tmp_path) as gateway:
        response = httpx.post(f"{gateway.url}/v1/completions", json={**LONG, "n": 10}, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        wait_until(small_server.holds_nothing, "the others are cancelled")
