"""A thousand cancelled requests leave nothing behind: no request, no block, no memory."""

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

WAVES, MOST_WAVES, IN_A_WAVE = 20, 60, 50
# So many tokens, and room for all of them, that none ends or is put aside before its cancel, though this process may be
# held up for a while.
CONTEXT, MAX_TOKENS = 1024, 960
KV_CACHE_TOKENS, PROMPT_TOKENS = IN_A_WAVE * CONTEXT, 480
# Every number of rows that is computed for the first time compiles code that stays, and allocators settle; when they
# have, the last so many waves need no more memory. What leaks never settles.
SETTLED_WAVES = 8
ALLOWED_GROWTH = 12 * 2**20


def engine_process(server: Server) -> psutil.Process:
    children = psutil.Process(server.process_id).children(recursive=True)
    (found,) = [child for child in children if any(f"/{ENGINE}/1/model.py" in part for part in child.cmdline())]
    return found


def wave(server: Server, number: int) -> None:
    """Half of them stream, and are cancelled when their first text is there; half are cancelled before."""
    with contextlib.ExitStack() as stack:
        calls = [
            stack.enter_context(
                call(
                    server.grpc, f"{number}, {index} birds", stream=index % 2 == 0, request_id=f"{number}-{index}",
                    max_tokens=MAX_TOKENS, ignore_eos=True,
                )
            )
            for index in range(IN_A_WAVE)
        ]  # fmt: skip
        firsts = [[made.next()] if index % 2 == 0 else [] for index, made in enumerate(calls)]
        wait_until(lambda: server.status()["running"] == IN_A_WAVE, "all of them run")
        with ThreadPoolExecutor(8) as threads:
            reports = list(threads.map(lambda made: server.command(CANCEL, made.id), calls))
        assert reports == [{"cancelled": 1}] * IN_A_WAVE
        for made, first in zip(calls, firsts, strict=True):
            assert made.answer(*first).last.finish_reason == "cancelled"


def fill_the_cache(server: Server) -> None:
    """Read as many tokens as it has places, none of them twice: from then on all of its memory is resident."""
    for number in range(KV_CACHE_TOKENS // PROMPT_TOKENS + 2):
        inputs = {INPUT_IDS.name: [number] * PROMPT_TOKENS, STREAM.name: False}
        with Call(server.grpc, inputs, parameters={"max_tokens": 1}) as made:
            made.answer()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An LM slow enough that none ends before its cancel."""
    repository = copy_repository(tmp_path, slow=True, n_layer=8, n_positions=CONTEXT)
    with running(repository, kv_cache_tokens=KV_CACHE_TOKENS) as server:
        yield server


def test_a_thousand_cancelled_requests_leave_nothing_behind(server: Server) -> None:
    engine = engine_process(server)
    fill_the_cache(server)
    before = server.status()
    memory: list[int] = []

    def growth() -> int:
        return memory[-1] - memory[-1 - SETTLED_WAVES]

    while len(memory) < WAVES or (len(memory) < MOST_WAVES and growth() >= ALLOWED_GROWTH):
        wave(server, len(memory))
        memory.append(engine.memory_info().rss)
    after = server.status()
    assert after["cancelled"] - before["cancelled"] == len(memory) * IN_A_WAVE
    assert (after["running"], after["waiting"], after["blocks_used"]) == (0, 0, 0)
    assert after["requests"] == sum(after[name] for name in ("finished", "cancelled", "timed_out"))
    assert growth() < ALLOWED_GROWTH, memory
