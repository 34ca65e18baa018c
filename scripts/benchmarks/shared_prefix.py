"""A decoding step of sequences with a long shared prefix, compared with one without, in the engine alone.

    scripts/bench shared_prefix [--dtype bfloat16] [--batch 8 32] [--shared-tokens 512]

GPT-2 124M with random weights. Both cases have prompts of equal length and alternate; they differ only in whether the
sequences share the KV cache blocks of the prefix.
"""

from __future__ import annotations

import argparse
import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkpoints
from engine_side import EngineSide, Prompts
from rich.console import Console
from rich.table import Table

OWN_TOKENS, NEW_TOKENS, ROUNDS = 16, 33, 4


def prompts(rng: random.Random, count: int, shared_tokens: int, shared: bool) -> Prompts:
    def tokens(length: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(length)]

    prefix = tokens(shared_tokens)
    return [(prefix if shared else tokens(shared_tokens)) + tokens(OWN_TOKENS) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--shared-tokens", type=int, default=512)
    options = parser.parse_args()
    side = EngineSide(checkpoints.gpt2(options.dtype), options.dtype, max(options.batch), "auto")
    table = Table(title=f"milliseconds per decoding step after {options.shared_tokens} tokens, {options.dtype}")
    for name in ("batch", "not shared", "shared", "ratio"):
        table.add_column(name, justify="right")
    rng = random.Random(0)
    for batch in options.batch:
        best = {False: float("inf"), True: float("inf")}
        for _ in range(ROUNDS):
            for shared in (False, True):
                seconds = side.measure(prompts(rng, batch, options.shared_tokens, shared), NEW_TOKENS).decode
                best[shared] = min(best[shared], 1000 * seconds / (NEW_TOKENS - 1))
        table.add_row(str(batch), f"{best[False]:.2f}", f"{best[True]:.2f}", f"{best[False] / best[True]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
