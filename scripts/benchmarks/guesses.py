"""Tokens per second with guesses ahead (`--speculative-tokens`) and without, in the engine alone.

    scripts/bench guesses [--batch 1 4 8]

GPT-2 124M with random weights, at its two ends: its likeliest text soon repeats itself, so that nearly every guess is
right; drawn at temperature 1 it never does, so that there is nothing to guess. Between them a trained LM, the bundled
fable, whose stories have turns of phrase. Both sides give the same texts, and take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import serving
from engine_side import ROOT, EngineSide
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

Ask = Callable[[random.Random, Tokenizer], list[int]]

NEW_TOKENS, TURNS, GUESSES = 193, 3, 15
FABLE = ROOT / "model_repository" / "fable" / "1"
HEROES, THINGS = ("fox", "owl", "hare", "crow", "bear"), ("lantern", "ladder", "boat", "key", "bell")


def nonsense(draw: random.Random, _: Tokenizer) -> list[int]:
    return [draw.randrange(50_000) for _ in range(32)]


def story(draw: random.Random, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(f"Tell me a story about a {draw.choice(HEROES)} and a {draw.choice(THINGS)}").ids
    return ids


def rows(folder: Path, batches: list[int], text: str, ask: Ask, temperature: float) -> Iterator[list[str]]:
    sides = [EngineSide(folder, "bfloat16", max(batches), "auto", guesses=count) for count in (0, GUESSES)]
    tokenizer, draw = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(0)
    for batch in batches:
        speeds: list[list[float]] = [[], []]
        before = sides[1].measures()
        for _ in range(TURNS):
            prompts = [ask(draw, tokenizer) for _ in range(batch)]
            for side, found in zip(sides, speeds, strict=True):
                found.append(batch * (NEW_TOKENS - 1) / side.measure(prompts, NEW_TOKENS, temperature).decode)
        after = sides[1].measures()
        guessed, right = (after[n] - before[n] for n in ("guessed_tokens", "rightly_guessed_tokens"))
        without, with_guesses = (statistics.median(found) for found in speeds)
        speed = (f"{without:,.0f}", f"{with_guesses:,.0f}", f"{with_guesses / without:.2f}")
        yield [text, str(batch), *speed, f"{right:,.0f} of {guessed:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    table = Table(title=f"decoding, tokens/s, bfloat16, at most {GUESSES} guesses")
    for name in ("the text", "batch", "without", "with", "ratio", "guesses that were right"):
        table.add_column(name, justify="left" if name == "the text" else "right")
    random_weights = serving.make_checkpoint("bfloat16")
    for folder, text, ask, temperature in (
        (random_weights, "repeats itself", nonsense, 0.0), (random_weights, "never does", nonsense, 1.0),
        (FABLE, "fable's, likeliest", story, 0.0), (FABLE, "fable's, drawn", story, 1.0),
    ):  # fmt: skip
        for cells in rows(folder, options.batch, text, ask, temperature):
            table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
