"""A KV cache in int8 (`--kv-dtype int8`) beside one in the model's number type, in the engine alone.

    scripts/bench kv_cache --model FOLDER [--dtype bfloat16] [--context 4096] [--batch 1 8]
        [--text FILE] [--text-tokens 8192] [--window 2048]

Perplexity of a text, as prompts of `--window` tokens: the default text is this repository's documents. Then
milliseconds for each decoding step after prompts of `--context` tokens; the two engines alternate.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from engine_side import ROOT, EngineSide
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

KV_DTYPES = ("auto", "int8")
NEW_TOKENS, ROUNDS = 33, 2


def documents() -> str:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def perplexity(side: EngineSide, windows: list[list[int]]) -> float:
    logprobs = [value for window in windows for value in side.prompt_logprobs(window)]
    return math.exp(-sum(logprobs) / len(logprobs))


def perplexity_table(sides: dict[str, EngineSide], windows: list[list[int]]) -> Table:
    table = Table(title=f"perplexity of {sum(map(len, windows)):,} tokens in windows of {len(windows[0]):,}")
    for name in (*sides, "change"):
        table.add_column(name, justify="right")
    values = [perplexity(side, windows) for side in sides.values()]
    table.add_row(*(f"{value:.4f}" for value in values), f"{values[1] / values[0] - 1:+.3%}")
    return table


def decode_table(sides: dict[str, EngineSide], batches: list[int], context: int) -> Table:
    table = Table(title=f"milliseconds for each decoding step after {context:,} tokens, and for the prompts")
    for name in ("batch", *sides, "ratio", *(f"{kind}: prompts" for kind in sides), "ratio"):
        table.add_column(name, justify="right")
    rng = random.Random(0)
    for batch in batches:
        best = dict.fromkeys(sides, (float("inf"), float("inf")))
        for _ in range(ROUNDS):
            for kind, side in sides.items():
                # Other prompts each time: the prefix cache does not hold them.
                prompts = [[rng.randrange(3, 30_000) for _ in range(context)] for _ in range(batch)]
                seconds = side.measure(prompts, NEW_TOKENS)
                milliseconds = (1000 * seconds.decode / (NEW_TOKENS - 1), 1000 * seconds.prefill)
                best[kind] = tuple(map(min, best[kind], milliseconds))
        row = [str(batch)]
        for column, digits in ((0, 2), (1, 0)):
            values = [best[kind][column] for kind in sides]
            row += [*(f"{value:.{digits}f}" for value in values), f"{values[0] / values[1]:.2f}"]
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="none: perplexity only")
    parser.add_argument("--text", type=Path, help="a text in UTF-8")
    parser.add_argument("--text-tokens", type=int, default=8192, help="0: no perplexity")
    parser.add_argument("--window", type=int, default=2048)
    options = parser.parse_args()
    console, slots = Console(), max([1, *options.batch])
    tokens = max(options.window, slots * (options.context + NEW_TOKENS)) + 16 * (slots + 1)
    sides = {
        kind: EngineSide(options.model, options.dtype, slots, "auto", kv_dtype=kind, kv_cache_tokens=tokens)
        for kind in KV_DTYPES
    }
    sizes = {kind: side.runner.memory.pool_bytes for kind, side in sides.items()}
    console.print(
        f"KV cache of {tokens:,} tokens: {sizes['auto'] / 1e6:,.0f} MB, in int8 {sizes['int8'] / 1e6:,.0f} MB "
        f"({sizes['int8'] / sizes['auto']:.2f})"
    )
    if options.text_tokens:
        text = options.text.read_text(encoding="utf-8") if options.text else documents()
        ids = Tokenizer.from_file(str(options.model / "tokenizer.json")).encode(text).ids[: options.text_tokens]
        windows = [ids[start : start + options.window] for start in range(0, len(ids), options.window)]
        console.print(perplexity_table(sides, [window for window in windows if len(window) > 1]))
    if options.batch:
        console.print(decode_table(sides, options.batch, options.context))


if __name__ == "__main__":
    main()
