"""Tokens per second with speculative decoding (`--speculative-tokens`) and without, in the engine alone.

    scripts/bench speculation [--batch 1 4 8]

GPT-2 124M with random weights gives the two extremes: its greedy text soon repeats itself, so that nearly every draft
token is accepted; text sampled at temperature 1 never does, so that there are no draft tokens. Between them is a
trained LM, the bundled fable, whose stories repeat phrases. Both engines generate the same texts, in alternation.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkpoints
from engine_side import ROOT, EngineSide
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

# isort: split
# From here on, `engine` is the engine's package and not the benchmark.
from engine.monitoring.metrics import ACCEPTED_TOKENS, DRAFT_TOKENS

MakePrompt = Callable[[random.Random, Tokenizer], list[int]]

NEW_TOKENS, REPEATS, SPECULATIVE_TOKENS = 193, 3, 15
FABLE = ROOT / "model_repository" / "fable" / "1"
HEROES, THINGS = ("fox", "owl", "hare", "crow", "bear"), ("lantern", "ladder", "boat", "key", "bell")


def random_prompt(generator: random.Random, _: Tokenizer) -> list[int]:
    return [generator.randrange(50_000) for _ in range(32)]


def story_prompt(generator: random.Random, tokenizer: Tokenizer) -> list[int]:
    text = f"Tell me a story about a {generator.choice(HEROES)} and a {generator.choice(THINGS)}"
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def rows(
    folder: Path, batches: list[int], text: str, make_prompt: MakePrompt, temperature: float
) -> Iterator[list[str]]:
    sides = [
        EngineSide(folder, "bfloat16", max(batches), "auto", speculative_tokens=count)
        for count in (0, SPECULATIVE_TOKENS)
    ]
    tokenizer, generator = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(0)
    for batch in batches:
        speeds: list[list[float]] = [[], []]
        before = sides[1].metric_values()
        for _ in range(REPEATS):
            prompts = [make_prompt(generator, tokenizer) for _ in range(batch)]
            for side, side_speeds in zip(sides, speeds, strict=True):
                seconds = side.measure(prompts, NEW_TOKENS, temperature).decode
                side_speeds.append(batch * (NEW_TOKENS - 1) / seconds)
        after = sides[1].metric_values()
        drafted, accepted = (after[name] - before[name] for name in (DRAFT_TOKENS, ACCEPTED_TOKENS))
        without, speculative = (statistics.median(side_speeds) for side_speeds in speeds)
        speed = (f"{without:,.0f}", f"{speculative:,.0f}", f"{speculative / without:.2f}")
        yield [text, str(batch), *speed, f"{accepted:,.0f} of {drafted:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    table = Table(title=f"decoding, tokens/s, bfloat16, at most {SPECULATIVE_TOKENS} draft tokens")
    for name in ("text", "batch", "without", "with", "ratio", "accepted draft tokens"):
        table.add_column(name, justify="left" if name == "text" else "right")
    random_weights = checkpoints.gpt2("bfloat16")
    for folder, text, make_prompt, temperature in (
        (random_weights, "repetitive", random_prompt, 0.0), (random_weights, "random", random_prompt, 1.0),
        (FABLE, "fable, greedy", story_prompt, 0.0), (FABLE, "fable, sampled", story_prompt, 1.0),
    ):  # fmt: skip
        for cells in rows(folder, options.batch, text, make_prompt, temperature):
            table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
