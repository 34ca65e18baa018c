"""Profiles the time of a step by stage, in the engine alone, and CPU time per token by process, through HTTP.

It reads the engine's timers and the processes' CPU times, and sets them beside the machine's limits. `engine`,
`checkpoints` and `servers` define models, workloads and servers.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import servers
import torch
from checkpoints import Model
from engine.output import step_output
from engine.runners.native.runner import STAGES, NativeRunner
from load import prompts_of
from machine_limits import Limits
from reads import Cost
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 97, 512
WORKS = ("W1-1", "W1-8", "W1-32", "W2", "W3")


@dataclass(frozen=True)
class Profile:
    """What is profiled; `side` is an engine_side.EngineSide."""

    title: str
    side: Any
    cost: Cost
    bytes_per_weight: float

    @property
    def stages(self) -> list[str]:
        return [*(STAGES if isinstance(self.side.runner, NativeRunner) else ["model"]), "sampling", "Python"]


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


def engine_table(profile: Profile, batches: list[int], dtype: torch.dtype) -> Table:
    table = Table(title=f"{profile.title}: one step of the engine alone, milliseconds (share)")
    for name in ("step", "total", *profile.stages, "of bandwidth", "of matmul peak"):
        table.add_column(name, justify="right")
    profile.side.measure(_prompts(1, PROMPT_TOKENS), 4)
    before = Limits.measured(dtype)
    measured = [(batch, _decoding_step(profile, batch)) for batch in batches]
    # One token out: the prompt alone.
    prefill = _measure(profile.side, _prompts(1, PREFILL_TOKENS), 1)
    limits = before.between(Limits.measured(dtype))
    for batch, stages in measured:
        seconds = sum(stages.values())
        context = PROMPT_TOKENS + NEW_TOKENS / 2
        read = profile.cost.step_bytes(batch, context, profile.bytes_per_weight, dtype.itemsize)
        shares = (read / seconds / limits.read, profile.cost.operations(batch, batch) / seconds / limits.matmul)
        table.add_row(str(batch), *_cells(stages), *(f"{share:.0%}" for share in shares))
    share = profile.cost.operations(PREFILL_TOKENS, 1) / sum(prefill.values()) / limits.matmul
    table.add_row(f"prefill of {PREFILL_TOKENS}", *_cells(prefill), "", f"{share:.0%}")
    table.caption = (
        f"{limits.read / 1e9:.1f} GB/s read, {limits.matmul / 1e9:,.0f} GFLOP/s matmul, "
        f"{8 * profile.bytes_per_weight:g} bits for each weight"
    )
    return table


def _cells(stages: dict[str, float]) -> list[str]:
    total = sum(stages.values())
    return [f"{1000 * total:.2f}", *(f"{1000 * seconds:.2f} ({seconds / total:.0%})" for seconds in stages.values())]


def _decoding_step(profile: Profile, batch: int) -> dict[str, float]:
    """Seconds by stage."""
    prompts, stages = _prompts(batch, PROMPT_TOKENS), dict.fromkeys(profile.stages, 0.0)
    for sign, new_tokens in ((-1, 2), (1, NEW_TOKENS)):
        # Both runs include the prompts and the first step: the difference is decoding alone.
        for name, seconds in _measure(profile.side, prompts, new_tokens).items():
            stages[name] += sign * seconds / (NEW_TOKENS - 2)
    return stages


def _prompts(batch: int, tokens: int) -> list[list[int]]:
    generator = random.Random(f"{batch} {tokens}")
    return [[generator.randrange(49_000) for _ in range(tokens)] for _ in range(batch)]


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


def path_table(model: Model, dtype: str, weights: str) -> Table:
    folder = model.checkpoint(dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    form = f"{dtype}, {weights} weights"
    title = f"{model.title}, through HTTP, {form}: microseconds of CPU time per token ({os.cpu_count()} cores)"
    table = Table(title=title)
    for name in ("", "tokens/s", *servers.ROLES.values(), "client"):
        table.add_column(name, justify="right")
    with servers.running(servers.OURS, folder, dtype, ("--weights", weights)) as server:
        for work in model.workloads(WORKS):
            before = dict(_cpu_seconds(server.pid))
            measured = server.measure(work, prompts_of(work, tokenizer, 0))
            after = dict(_cpu_seconds(server.pid))
            cells = [
                1e6 * (after[role] - before[role]) / measured.tokens for role in (*servers.ROLES.values(), "client")
            ]
            table.add_row(work.name, f"{measured.speed:,.0f}", *(f"{cell:,.0f}" for cell in cells))
    return table


def _cpu_seconds(server_pid: int) -> Iterator[tuple[str, float]]:
    seconds = dict.fromkeys((*servers.ROLES.values(), "client"), 0.0)
    for process in [psutil.Process(), *psutil.Process(server_pid).children(recursive=True)]:
        role = "client" if process.pid == os.getpid() else servers.role_of(process)
        if role:
            times = process.cpu_times()
            seconds[role] += times.user + times.system
    yield from seconds.items()


def show(profile: Profile, batches: list[int], dtype: torch.dtype, served: Model, weights: str) -> None:
    """`served` is the model that goes through HTTP, with weights of this form."""
    console = Console(width=160)
    console.print(engine_table(profile, batches, dtype))
    console.print(path_table(served, str(dtype).removeprefix("torch."), weights))
