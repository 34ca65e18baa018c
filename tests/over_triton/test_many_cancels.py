"""A thousand cancelled requests leak no request, no block and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tritonlm.contract.control import CANCEL
from tritonlm.contract.tensors import INPUT_IDS, STREAM

from .caller import Call, call
from .servers import ENGINE, Server, copy_repository, running, wait_until

pytestmark = pytest.mark.triton

WAVES, WAVE_SIZE = 20, 50
# Long requests and a KV cache for all of them, so that none finishes or is preempted before it is cancelled, even when
# the test is delayed.
CONTEXT, MAX_TOKENS = 1024, 960
KV_CACHE_TOKENS, PROMPT_TOKENS = WAVE_SIZE * CONTEXT, 480
# Memory is compared from this wave on, when allocators have reached a steady state.
WARMUP_WAVES = 8
MAX_GROWTH_BYTES = 20 * 2**20


def engine_process(server: Server) -> psutil.Process:
    children = psutil.Process(server.process_id).children(recursive=True)
    (process,) = [child for child in children if any(f"/{ENGINE}/1/model.py" in part for part in child.cmdline())]
    return process


def wave(server: Server, number: int) -> None:
    """Half of the requests stream and are cancelled after their first chunk; the other half is not streamed."""
    with contextlib.ExitStack() as stack:
        calls = [
            stack.enter_context(
                call(
                    server.grpc, f"{number}, {index} birds", stream=index % 2 == 0, request_id=f"{number}-{index}",
                    max_tokens=MAX_TOKENS, ignore_eos=True,
                )
            )
            for index in range(WAVE_SIZE)
        ]  # fmt: skip
        firsts = [[request.next()] if index % 2 == 0 else [] for index, request in enumerate(calls)]
        wait_until(lambda: server.status()["running"] == WAVE_SIZE, "all of them run")
        with ThreadPoolExecutor(8) as threads:
            reports = list(threads.map(lambda request: server.command(CANCEL, request.id), calls))
        assert reports == [{"cancelled": 1}] * WAVE_SIZE
        for request, first in zip(calls, firsts, strict=True):
            assert request.read_all(*first).last.finish_reason == "cancelled"


def fill_the_cache(server: Server) -> None:
    """Prefill as many distinct tokens as the cache holds, so that all of its memory is resident."""
    for number in range(KV_CACHE_TOKENS // PROMPT_TOKENS + 2):
        inputs = {INPUT_IDS.name: [number] * PROMPT_TOKENS, STREAM.name: False}
        with Call(server.grpc, inputs, parameters={"max_tokens": 1}) as request:
            request.read_all()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Triton with an LM that is slow enough that no request finishes before it is cancelled."""
    repository = copy_repository(tmp_path, slow="native", n_layer=8, n_positions=CONTEXT)
    with running(repository, kv_cache_tokens=KV_CACHE_TOKENS) as server:
        yield server


def test_a_thousand_cancelled_requests_leak_nothing(server: Server) -> None:
    engine = engine_process(server)
    fill_the_cache(server)
    before = server.status()
    memory = []
    for number in range(WAVES):
        wave(server, number)
        memory.append(engine.memory_info().rss)
    after = server.status()
    assert after["cancelled"] - before["cancelled"] == WAVES * WAVE_SIZE
    assert (after["running"], after["waiting"], after["blocks_used"]) == (0, 0, 0)
    assert after["requests"] == sum(after[name] for name in ("finished", "cancelled", "timed_out"))
    assert memory[-1] - memory[WARMUP_WAVES - 1] < MAX_GROWTH_BYTES
