"""A thousand cancelled requests leave nothing behind: no request, no block, no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from engine.runners.packed_linear import rounded_up
from tritonlm.contract.control import CANCEL
from tritonlm.contract.tensors import INPUT_IDS, STREAM

from .caller import Call, call
from .servers import ENGINE, Server, copy_repository, running, wait_until

pytestmark = pytest.mark.triton

WAVES, IN_A_WAVE = 20, 50
# So many tokens, and room for all of them, that none ends or is put aside before its cancel, though this process may be
# held up for a while.
CONTEXT, MAX_TOKENS = 1024, 960
KV_CACHE_TOKENS, PROMPT_TOKENS = IN_A_WAVE * CONTEXT, 480
# By then allocators have settled.
SETTLED_AFTER = 8
ALLOWED_GROWTH = 20 * 2**20


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


def compute_every_number_of_rows(server: Server) -> None:
    """Which compiles code that stays: of prompts, in their lengths, and of rows that are decoded together."""
    for length in range(2, PROMPT_TOKENS):
        if length == rounded_up(length):
            # No two begin alike, nor like what fills the cache: what is cached is not computed.
            inputs = {INPUT_IDS.name: ([length, length + 1] * length)[:length], STREAM.name: False}
            with Call(server.grpc, inputs, parameters={"max_tokens": 1}) as made:
                made.answer()
    with contextlib.ExitStack() as stack:
        asked = [{"max_tokens": 40 + 4 * index, "ignore_eos": True} for index in range(IN_A_WAVE)]
        for made in [stack.enter_context(call(server.grpc, "birds", stream=False, **wanted)) for wanted in asked]:
            made.answer()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An LM slow enough that none ends before its cancel."""
    repository = copy_repository(tmp_path, slow=True, n_layer=8, n_positions=CONTEXT)
    with running(repository, kv_cache_tokens=KV_CACHE_TOKENS) as server:
        yield server


def test_a_thousand_cancelled_requests_leave_nothing_behind(server: Server) -> None:
    engine = engine_process(server)
    compute_every_number_of_rows(server)
    fill_the_cache(server)
    before = server.status()
    memory = []
    for number in range(WAVES):
        wave(server, number)
        memory.append(engine.memory_info().rss)
    after = server.status()
    assert after["cancelled"] - before["cancelled"] == WAVES * IN_A_WAVE
    assert (after["running"], after["waiting"], after["blocks_used"]) == (0, 0, 0)
    assert after["requests"] == sum(after[name] for name in ("finished", "cancelled", "timed_out"))
    assert memory[-1] - memory[SETTLED_AFTER - 1] < ALLOWED_GROWTH
