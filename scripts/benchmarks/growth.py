"""Throughput by number of concurrent requests, and step time by context length.

    scripts/bench growth [--dtype bfloat16] [--max-concurrency 256] [--write]

Concurrent requests: 1, 2, 4 … with 32 prompt and 64 output tokens, in the engine alone and through HTTP, with one slot
each. Context: one decoding step of 8 sequences at 128, 256 … tokens. `--write` puts the table and the plot into
docs/performance.md. The checkpoint is that of `serving`: GPT-2 124M with random weights.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

# As in the models' processes: spinning OpenMP threads slow down other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkpoints
import processor
import servers
import serving_report
from engine_side import EngineSide
from load import Workload, prompts_of
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS, CONTEXT_BATCH, CONTEXT_STEPS, MAX_CONTEXT = 32, 64, 8, 17, 1024
# Requests per client at each level, so that the ramp-up and the end weigh less.
ROUNDS = 2
PLOT = serving_report.PLOT.with_name("growth.svg")
stderr = Console(stderr=True)


def engine_throughput(side: EngineSide, batch_sizes: list[int]) -> list[float]:
    rng = random.Random(0)
    speeds = []
    for batch in track(batch_sizes, "engine alone, by concurrent requests", console=stderr, transient=True):
        prompts = [[rng.randrange(50_000) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
        start = time.perf_counter()
        side.measure(prompts, NEW_TOKENS)
        speeds.append(batch * NEW_TOKENS / (time.perf_counter() - start))
    return speeds


def http_throughput(folder: Path, dtype: str, batch_sizes: list[int]) -> list[float]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    speeds = []
    with servers.running(servers.OURS, folder, dtype, ("--max-sequences", str(max(batch_sizes)))) as server:
        for batch in track(batch_sizes, "through HTTP, by concurrent requests", console=stderr, transient=True):
            work = Workload(f"growth {batch}", batch, ROUNDS * batch, PROMPT_TOKENS, NEW_TOKENS)
            speeds.append(server.measure(work, prompts_of(work, tokenizer, 0)).speed)
    return speeds


def step_times(side: EngineSide, lengths: list[int]) -> list[float]:
    """Milliseconds per step."""
    rng = random.Random(0)
    milliseconds = []
    for length in track(lengths, "step time, by context length", console=stderr, transient=True):
        count = length - CONTEXT_STEPS
        prompts = [[rng.randrange(50_000) for _ in range(count)] for _ in range(CONTEXT_BATCH)]
        milliseconds.append(1000 * side.measure(prompts, CONTEXT_STEPS).decode / (CONTEXT_STEPS - 1))
    return milliseconds


def powers_of_two(first: int, last: int) -> list[int]:
    return [first << n for n in range(20) if first << n <= last]


def report(
    batch_sizes: list[int], alone: list[float], served: list[float], lengths: list[int], steps: list[float]
) -> str:
    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    description = f"GPT-2 124M, random weights, {processor.machine()}."
    return "\n".join(
        [
            description,
            "",
            row("concurrent requests", [str(batch) for batch in batch_sizes]),
            row("---", ["---:"] * len(batch_sizes)),
            row("engine alone, tokens/s", [f"{speed:,.0f}" for speed in alone]),
            row("through HTTP, tokens/s", [f"{speed:,.0f}" for speed in served]),
            "",
            row(f"context ({CONTEXT_BATCH} sequences)", [str(length) for length in lengths]),
            row("---", ["---:"] * len(lengths)),
            row("step, ms", [f"{step:.1f}" for step in steps]),
        ]
    )


def plot(
    batch_sizes: list[int], alone: list[float], served: list[float], lengths: list[int], steps: list[float]
) -> None:
    with serving_report.plot_file(PLOT, columns=2) as (left, right):
        left.plot(batch_sizes, alone, "o-", label="engine alone")
        left.plot(batch_sizes, served, "o-", label="through HTTP")
        left.set(xlabel="concurrent requests", ylabel="tokens/s", xscale="log", ylim=(0, None))
        left.set_xticks(batch_sizes, [str(batch) for batch in batch_sizes])
        left.legend(frameon=False)
        right.plot(lengths, steps, "o-")
        right.set(xlabel=f"context tokens ({CONTEXT_BATCH} sequences)", ylabel="step, ms", ylim=(0, None))
        right.set_xticks(lengths)


def median_of(work: Callable[[], list[float]], times: int) -> list[float]:
    """The median of several runs, point by point."""
    return [sorted(point)[times // 2] for point in zip(*(work() for _ in range(times)), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--max-concurrency", "--most", type=int, default=256, help="concurrent requests, at most")
    parser.add_argument("--repeat", type=int, default=3, help="number of runs; the median counts")
    parser.add_argument("--write", action="store_true", help="put the table and the plot into docs/performance.md")
    options = parser.parse_args()
    folder = checkpoints.gpt2(options.dtype)
    batch_sizes = powers_of_two(1, options.max_concurrency)
    lengths = list(range(128, MAX_CONTEXT + 1, 128))
    side = EngineSide(folder, options.dtype, options.max_concurrency, "auto")
    side.measure([[1, 2, 3]], 4)
    alone = median_of(lambda: engine_throughput(side, batch_sizes), options.repeat)
    steps = median_of(lambda: step_times(side, lengths), options.repeat)
    side.runner.close()
    served = median_of(lambda: http_throughput(folder, options.dtype, batch_sizes), options.repeat)
    text = report(batch_sizes, alone, served, lengths, steps)
    print(text)
    if options.write:
        serving_report.replace_part("growth", text)
        plot(batch_sizes, alone, served, lengths, steps)


if __name__ == "__main__":
    main()
