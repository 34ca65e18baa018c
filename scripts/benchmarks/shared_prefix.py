"""A decoding step of requests that share a long beginning, beside one of as many that do not, in the engine alone.

    scripts/bench shared_prefix [--dtype bfloat16] [--batch 8 32] [--shared-tokens 512]

GPT-2 124M with random weights. Both sides have prompts of the same lengths and take turns; what differs is whether the
blocks of the beginning are the same ones.
"""

from __future__ import annotations

import argparse
import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import serving
from engine_side import EngineSide, Prompts
from rich.console import Console
from rich.table import Table

OWN_TOKENS, NEW_TOKENS, TURNS = 16, 33, 4


def prompts(draw: random.Random, count: int, shared_tokens: int, shared: bool) -> Prompts:
    def tokens(length: int) -> list[int]:
        return [draw.randrange(50_000) for _ in range(length)]

    stem = tokens(shared_tokens)
    return [(stem if shared else tokens(shared_tokens)) + tokens(OWN_TOKENS) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--shared-tokens", type=int, default=512)
    options = parser.parse_args()
    side = EngineSide(serving.make_checkpoint(options.dtype), options.dtype, max(options.batch), "auto")
    table = Table(title=f"milliseconds of a decoding step behind {options.shared_tokens} tokens, {options.dtype}")
    for name in ("batch", "each its own", "shared", "ratio"):
        table.add_column(name, justify="right")
    draw = random.Random(0)
    for batch in options.batch:
        best = {False: float("inf"), True: float("inf")}
        for _ in range(TURNS):
            for shared in (False, True):
                seconds = side.measure(prompts(draw, batch, options.shared_tokens, shared), NEW_TOKENS).decode
                best[shared] = min(best[shared], 1000 * seconds / (NEW_TOKENS - 1))
        table.add_row(str(batch), f"{best[False]:.2f}", f"{best[True]:.2f}", f"{best[False] / best[True]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
