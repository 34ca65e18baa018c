"""Profiles the time of a decoding step by stage, in the engine alone, and CPU time per token by process, through HTTP.

It reads the engine's timers and the processes' CPU times. `engine` and `serving` define workloads and servers.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import serving
from engine.output import step_output
from engine.runners.native.runner import STAGES, NativeRunner
from load import measure, prompts_of
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 32, 97
WORKS = ("W1-1", "W1-8", "W1-32")


class TimedFunction:
    """Calls a function and adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._function(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - start


def engine_table(side: Any, batches: list[int], dtype: str) -> Table:
    """`side` is an engine_side.EngineSide."""
    table = Table(title=f"one decoding step of the engine alone, {dtype}: milliseconds (share)")
    names = [*(STAGES if isinstance(side.runner, NativeRunner) else ["model"]), "sampling", "Python"]
    for name in ("batch", "step", *names):
        table.add_column(name, justify="right")
    generator = random.Random(0)
    for batch in batches:
        seconds_by_stage = dict.fromkeys(names, 0.0)
        prompts = [[generator.randrange(50_000) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
        for sign, new_tokens in ((-1, 2), (1, NEW_TOKENS)):
            # Both runs include the prompts and the first step: the difference is decoding alone.
            for name, seconds in _measure(side, prompts, new_tokens).items():
                seconds_by_stage[name] += sign * seconds
        total, steps = sum(seconds_by_stage.values()), NEW_TOKENS - 2
        cells = [f"{1000 * seconds / steps:.2f} ({seconds / total:.0%})" for seconds in seconds_by_stage.values()]
        table.add_row(str(batch), f"{1000 * total / steps:.2f}", *cells)
    return table


def _measure(side: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    runner, native = side.runner, isinstance(side.runner, NativeRunner)
    forward, sample = TimedFunction(runner.forward), TimedFunction(step_output.sample)
    stage_seconds = runner.time_stages() if native else []
    original_sample = step_output.sample
    runner.forward, step_output.sample = forward, sample
    start = time.perf_counter()
    try:
        side.measure(prompts, new_tokens)
    finally:
        step_output.sample = original_sample
        del runner.forward
    rest = time.perf_counter() - start - forward.seconds - sample.seconds
    computed = dict(zip(STAGES, stage_seconds, strict=True)) if native else {"model": forward.seconds}
    # The rest of a step is Python: plans, block tables, chunks.
    return {**computed, "sampling": sample.seconds, "Python": rest + forward.seconds - sum(computed.values())}


def path_table(dtype: str) -> Table:
    folder = serving.make_checkpoint(dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    title = f"through HTTP, {dtype}: microseconds of CPU time per token ({os.cpu_count()} cores)"
    table = Table(title=title)
    for name in ("", "tokens/s", *serving.ROLES.values(), "client"):
        table.add_column(name, justify="right")
    with serving.running(serving.OURS, folder, dtype) as server:
        for name in WORKS:
            work = serving.WORKLOADS[name]
            before = dict(_cpu_seconds(server.pid))
            measured = measure(server.url, server.model, work, prompts_of(work, tokenizer, 0))
            after = dict(_cpu_seconds(server.pid))
            cells = [
                1e6 * (after[role] - before[role]) / measured.tokens for role in (*serving.ROLES.values(), "client")
            ]
            table.add_row(name, f"{measured.speed:,.0f}", *(f"{cell:,.0f}" for cell in cells))
    return table


def _cpu_seconds(server_pid: int) -> Iterator[tuple[str, float]]:
    seconds = dict.fromkeys((*serving.ROLES.values(), "client"), 0.0)
    for process in [psutil.Process(), *psutil.Process(server_pid).children(recursive=True)]:
        role = "client" if process.pid == os.getpid() else serving.role_of(process)
        if role:
            times = process.cpu_times()
            seconds[role] += times.user + times.system
    yield from seconds.items()


def show(side: Any, batches: list[int], dtype: str) -> None:
    console = Console(width=160)
    console.print(engine_table(side, batches, dtype))
    console.print(path_table(dtype))
