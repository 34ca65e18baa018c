"""How speed grows with the number of requests at once, and a step's time with the length of the context.

    scripts/bench growth [--dtype bfloat16] [--most 256] [--write]

Requests at once: 1, 2, 4 … of 32 tokens in and 64 out, by the engine alone and through HTTP, with a place for each.
Context: one decoding step of 8 sequences at 128, 256 … tokens. `--write` puts table and picture into
docs/performance.md. The checkpoint is `serving`'s: GPT-2 124M with random weights.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

# As the models' processes are started: another process beside a spinning OpenMP team makes both slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import serving
import serving_report
from engine_side import EngineSide
from load import Workload, measure, prompts_of
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS, CONTEXT_BATCH, CONTEXT_STEPS, LONGEST = 32, 64, 8, 17, 1024
# Each level is held for so many requests after one another, so that its beginning and its end count for less.
ROUNDS = 2
PICTURE = serving_report.PICTURE.with_name("growth.svg")
stderr = Console(stderr=True)


def by_crowd_in_engine(side: EngineSide, crowds: list[int]) -> list[float]:
    draw = random.Random(0)
    speeds = []
    for crowd in track(crowds, "the engine alone, by requests at once", console=stderr, transient=True):
        prompts = [[draw.randrange(50_000) for _ in range(PROMPT_TOKENS)] for _ in range(crowd)]
        start = time.perf_counter()
        side.measure(prompts, NEW_TOKENS)
        speeds.append(crowd * NEW_TOKENS / (time.perf_counter() - start))
    return speeds


def by_crowd_through_http(folder: Path, dtype: str, crowds: list[int]) -> list[float]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    speeds = []
    with serving.running(serving.OURS, folder, dtype, ("--max-sequences", str(max(crowds)))) as opened:
        for crowd in track(crowds, "through HTTP, by requests at once", console=stderr, transient=True):
            work = Workload(f"growth {crowd}", crowd, ROUNDS * crowd, PROMPT_TOKENS, NEW_TOKENS)
            speeds.append(measure(opened.url, opened.model, work, prompts_of(work, tokenizer, 0)).speed)
    return speeds


def by_context(side: EngineSide, lengths: list[int]) -> list[float]:
    """Milliseconds a step."""
    draw = random.Random(0)
    found = []
    for length in track(lengths, "a step, by the length of the context", console=stderr, transient=True):
        count = length - CONTEXT_STEPS
        prompts = [[draw.randrange(50_000) for _ in range(count)] for _ in range(CONTEXT_BATCH)]
        found.append(1000 * side.measure(prompts, CONTEXT_STEPS).decode / (CONTEXT_STEPS - 1))
    return found


def doubling(first: int, last: int) -> list[int]:
    return [first << n for n in range(20) if first << n <= last]


def report(crowds: list[int], alone: list[float], served: list[float], lengths: list[int], steps: list[float]) -> str:
    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    about = f"GPT-2 124M, random weights, {serving_report.machine()}."
    return "\n".join(
        [
            about,
            "",
            row("requests at once", [str(crowd) for crowd in crowds]),
            row("---", ["---:"] * len(crowds)),
            row("engine alone, tokens/s", [f"{speed:,.0f}" for speed in alone]),
            row("through HTTP, tokens/s", [f"{speed:,.0f}" for speed in served]),
            "",
            row(f"context ({CONTEXT_BATCH} at once)", [str(length) for length in lengths]),
            row("---", ["---:"] * len(lengths)),
            row("a step, ms", [f"{step:.1f}" for step in steps]),
        ]
    )


def draw(crowds: list[int], alone: list[float], served: list[float], lengths: list[int], steps: list[float]) -> None:
    with serving_report.picture(PICTURE, columns=2) as (left, right):
        left.plot(crowds, alone, "o-", label="engine alone")
        left.plot(crowds, served, "o-", label="through HTTP")
        left.set(xlabel="requests at once", ylabel="tokens/s", xscale="log", ylim=(0, None))
        left.set_xticks(crowds, [str(crowd) for crowd in crowds])
        left.legend(frameon=False)
        right.plot(lengths, steps, "o-")
        right.set(xlabel=f"tokens of context, {CONTEXT_BATCH} at once", ylabel="a step, ms", ylim=(0, None))
        right.set_xticks(lengths)


def median_of(work: Callable[[], list[float]], times: int) -> list[float]:
    """Of several turns, point by point."""
    return [sorted(point)[times // 2] for point in zip(*(work() for _ in range(times)), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--most", type=int, default=256, help="requests at once")
    parser.add_argument("--repeat", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/performance.md")
    options = parser.parse_args()
    folder = serving.make_checkpoint(options.dtype)
    crowds, lengths = doubling(1, options.most), list(range(128, LONGEST + 1, 128))
    side = EngineSide(folder, options.dtype, options.most, "auto")
    side.measure([[1, 2, 3]], 4)
    alone = median_of(lambda: by_crowd_in_engine(side, crowds), options.repeat)
    steps = median_of(lambda: by_context(side, lengths), options.repeat)
    side.runner.close()
    served = median_of(lambda: by_crowd_through_http(folder, options.dtype, crowds), options.repeat)
    text = report(crowds, alone, served, lengths, steps)
    print(text)
    if options.write:
        serving_report.replace_part("growth", text)
        draw(crowds, alone, served, lengths, steps)


if __name__ == "__main__":
    main()
