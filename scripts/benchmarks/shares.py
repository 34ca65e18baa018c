"""Where a decoding step's time goes, in the engine alone; and whose processor time a token takes on the whole path.

It knows the engine's clocks and the processes' own; workloads and servers are `engine`'s and `serving`'s.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import serving
from engine.output import step_output as outcome
from engine.runners.native.runner import PARTS, NativeRunner
from load import measure, prompts_of
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 32, 97
WORKS = ("W1-1", "W1-8", "W1-32")


class Clocked:
    """A function that adds up the seconds spent in it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work, self.seconds = work, 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work(*given, **named)
        finally:
            self.seconds += time.perf_counter() - start


def engine_table(side: Any, batches: list[int], dtype: str) -> Table:
    """`side` is engine.EngineSide."""
    table = Table(title=f"one decoding step of the engine alone, {dtype}: milliseconds (share)")
    names = [*(PARTS if isinstance(side.runner, NativeRunner) else ["model"]), "sampling", "Python"]
    for name in ("batch", "step", *names):
        table.add_column(name, justify="right")
    draw = random.Random(0)
    for batch in batches:
        parts = dict.fromkeys(names, 0.0)
        prompts = [[draw.randrange(50_000) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
        for sign, new_tokens in ((-1, 2), (1, NEW_TOKENS)):
            # Prompts and the first steps are in both: what differs is decoding alone.
            for name, seconds in _spent(side, prompts, new_tokens).items():
                parts[name] += sign * seconds
        whole, steps = sum(parts.values()), NEW_TOKENS - 2
        cells = [f"{1000 * seconds / steps:.2f} ({seconds / whole:.0%})" for seconds in parts.values()]
        table.add_row(str(batch), f"{1000 * whole / steps:.2f}", *cells)
    return table


def _spent(side: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    runner, native = side.runner, isinstance(side.runner, NativeRunner)
    forward, sample = Clocked(runner.forward), Clocked(outcome.sample)
    within = runner.time_parts() if native else []
    kept = outcome.sample
    runner.forward, outcome.sample = forward, sample
    start = time.perf_counter()
    try:
        side.measure(prompts, new_tokens)
    finally:
        outcome.sample = kept
        del runner.forward
    rest = time.perf_counter() - start - forward.seconds - sample.seconds
    computed = dict(zip(PARTS, within, strict=True)) if native else {"model": forward.seconds}
    # What of a step is not in the kernels is Python's: plans, tables, chunks.
    return {**computed, "sampling": sample.seconds, "Python": rest + forward.seconds - sum(computed.values())}


def path_table(dtype: str) -> Table:
    folder = serving.make_checkpoint(dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    title = f"the whole path, {dtype}: microseconds of processor time for each token ({os.cpu_count()} cores)"
    table = Table(title=title)
    for name in ("", "tokens/s", *serving.ROLES.values(), "client"):
        table.add_column(name, justify="right")
    with serving.running(serving.OURS, folder, dtype) as opened:
        for name in WORKS:
            work = serving.WORKLOADS[name]
            before = dict(_processor_seconds(opened.pid))
            measured = measure(opened.url, opened.model, work, prompts_of(work, tokenizer, 0))
            after = dict(_processor_seconds(opened.pid))
            cells = [
                1e6 * (after[role] - before[role]) / measured.tokens for role in (*serving.ROLES.values(), "client")
            ]
            table.add_row(name, f"{measured.speed:,.0f}", *(f"{cell:,.0f}" for cell in cells))
    return table


def _processor_seconds(server: int) -> Iterator[tuple[str, float]]:
    seconds = dict.fromkeys((*serving.ROLES.values(), "client"), 0.0)
    for process in [psutil.Process(), *psutil.Process(server).children(recursive=True)]:
        role = "client" if process.pid == os.getpid() else serving.role_of(process)
        if role:
            spent = process.cpu_times()
            seconds[role] += spent.user + spent.system
    yield from seconds.items()


def show(side: Any, batches: list[int], dtype: str) -> None:
    console = Console(width=160)
    console.print(engine_table(side, batches, dtype))
    console.print(path_table(dtype))
