"""Tokens per second with multi-step decoding and with single steps, in the engine alone.

    scripts/bench multi_step [--model gpt2 gemma3-270m] [--checkpoint FOLDER] [--batch 1 8] [--temperature 0 1]

Both engines have the same weights, and generate the same texts, in alternation; medians of the runs.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkpoints
import processor
from engine_side import EngineSide, SteppedEngine
from rich.console import Console
from rich.table import Table

PROMPT_TOKENS, NEW_TOKENS = 32, 129


def rows(title: str, folder: Path, options: argparse.Namespace) -> Iterator[list[str]]:
    batches = options.batch
    several = EngineSide(folder, "bfloat16", max(batches), "native", "auto", kv_cache_tokens=max(batches) * 256)
    single = SteppedEngine(several.runner, replace(several.config, multi_step_tokens=1), lambda ids, _: f"{ids}")
    generator = random.Random(0)
    for batch in batches:
        for temperature in options.temperature:
            speeds: tuple[list[float], list[float]] = ([], [])
            for number in range(options.repeat + 1):
                prompts = [[generator.randrange(3, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
                for side, side_speeds in zip((single, several), speeds, strict=True):
                    seconds = side.measure(prompts, NEW_TOKENS, temperature).decode
                    # The first run warms up.
                    if number:
                        side_speeds.append(batch * (NEW_TOKENS - 1) / seconds)
            ratio = statistics.median(after / before for before, after in zip(*speeds, strict=True))
            medians = [f"{statistics.median(side_speeds):,.0f}" for side_speeds in speeds]
            yield [title, str(batch), f"{temperature:g}", *medians, f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=list(checkpoints.MODELS), default=["gpt2"])
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="further models")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    table = Table(title=f"decoding, tokens/s, bfloat16, {processor.kind().name}")
    for name in ("model", "batch", "temperature", "single steps", "several", "ratio"):
        table.add_column(name, justify="left" if name == "model" else "right")
    models = [checkpoints.MODELS[name] for name in options.model]
    folders = [(model.title, model.checkpoint("bfloat16")) for model in models]
    for title, folder in (*folders, *((folder.name, folder) for folder in options.checkpoint)):
        for cells in rows(title, folder, options):
            table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
