"""Milliseconds to sample a step's tokens, by the kernels and by torch, for rows of GPT-2's vocabulary.

    scripts/bench sampling [--rows 1 8 32]

Logits have a normal distribution of standard deviation 3: flatter than a trained model's, so that top-p keeps many.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkpoints
import numpy as np
import torch
from engine_side import EngineSide
from rich.console import Console
from rich.table import Table

# isort: split
# From here on, `engine` is the engine's package and not the benchmark.
from engine.sampling.logit_filters import SamplingSettings, sample_tokens

VOCAB_SIZE, REPEATS = 50_257, 9
SETTINGS = {
    "temperature 1": SamplingSettings(1.0, 0, 1.0, 0.0),
    "top-k 50": SamplingSettings(1.0, 50, 1.0, 0.0),
    "top-p 0.9": SamplingSettings(1.0, 0, 0.9, 0.0),
    "0.8, top-k 50, top-p 0.9, min-p 0.01": SamplingSettings(0.8, 50, 0.9, 0.01),
}


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    runner = EngineSide(checkpoints.gpt2("bfloat16"), "bfloat16", 1, "native").runner
    table = Table(title=f"milliseconds to sample a token for each row, {torch.get_num_threads()} threads")
    for name in ("rows", "settings", "kernels", "torch", "ratio"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    generator = np.random.default_rng(0)
    for rows in options.rows:
        for name, settings in SETTINGS.items():
            kernel_times, torch_times = [], []
            for _ in range(REPEATS):
                logits = torch.from_numpy(generator.normal(0, 3, (rows, VOCAB_SIZE)).astype(np.float32))
                arguments = (logits, [settings] * rows, generator.random(rows))
                kernel_times.append(milliseconds(lambda: runner.sample_tokens(*arguments)))  # noqa: B023 (called at once)
                torch_times.append(milliseconds(lambda: sample_tokens(*arguments)))  # noqa: B023
            kernels, by_torch = statistics.median(kernel_times), statistics.median(torch_times)
            table.add_row(str(rows), name, f"{kernels:.2f}", f"{by_torch:.2f}", f"{by_torch / kernels:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
