"""Milliseconds that drawing a step's tokens takes, by the kernels and by torch, for rows of GPT-2's vocabulary.

    scripts/bench draw [--rows 1 8 32]

Logits come from a normal distribution of spread 3: flatter than a trained model's, so that top-p has much to keep.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import serving
import torch
from engine_side import EngineSide
from rich.console import Console
from rich.table import Table

# isort: split
# Only from here on this name is the engine's package.
from engine.sampling import logit_filters

VOCABULARY, TURNS = 50_257, 9
WAYS = {
    "temperature 1": logit_filters.DrawSettings(1.0, 0, 1.0, 0.0),
    "top-k 50": logit_filters.DrawSettings(1.0, 50, 1.0, 0.0),
    "top-p 0.9": logit_filters.DrawSettings(1.0, 0, 0.9, 0.0),
    "0.8, top-k 50, top-p 0.9, min-p 0.01": logit_filters.DrawSettings(0.8, 50, 0.9, 0.01),
}


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    runner = EngineSide(serving.make_checkpoint("bfloat16"), "bfloat16", 1, "native").runner
    table = Table(title=f"milliseconds of drawing a token for each row, {torch.get_num_threads()} threads")
    for name in ("rows", "how", "kernels", "torch", "ratio"):
        table.add_column(name, justify="left" if name == "how" else "right")
    source = np.random.default_rng(0)
    for rows in options.rows:
        for name, way in WAYS.items():
            mine, torchs = [], []
            for _ in range(TURNS):
                logits = torch.from_numpy(source.normal(0, 3, (rows, VOCABULARY)).astype(np.float32))
                given = (logits, [way] * rows, source.random(rows))
                mine.append(milliseconds(lambda: runner.draw(*given)))  # noqa: B023 (it is called at once)
                torchs.append(milliseconds(lambda: logit_filters.draw(*given)))  # noqa: B023
            found, other = statistics.median(mine), statistics.median(torchs)
            table.add_row(str(rows), name, f"{found:.2f}", f"{other:.2f}", f"{other / found:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
