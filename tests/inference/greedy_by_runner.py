"""Prints as JSON the greedy tokens of one prompt by each runner and by transformers, and torch's CPU capability.

    python greedy_by_runner.py CHECKPOINT

It is a process of its own, since a process chooses its instructions once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repository" / "generate" / "1"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import EngineConfig
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence

STEPS, PROMPT = 40, [5, 17, 300, 2]


def generate_by(folder: Path, name: str) -> tuple[str, list[int]]:
    runner = open_runner(folder, EngineConfig(device="cpu", dtype="float32", runner=name), torch.device("cpu"))
    sequence, start = Sequence(list(PROMPT), [1, 2, 3, 4], needs_every_row=False), 0
    for _ in range(STEPS):
        part: Any = Slice(sequence, start, len(sequence.ids) - start)  # type: ignore[arg-type]
        start = len(sequence.ids)
        sequence.ids.append(int(runner.forward([part]).logits[-1].argmax()))
    return type(runner).__name__, sequence.ids[len(PROMPT) :]


def main() -> None:
    folder = Path(sys.argv[1])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0
    )
    results = {name: generate_by(folder, name) for name in ("native", "reference")}
    ids = {name: ids for name, (_, ids) in results.items()} | {"transformers": expected[0, len(PROMPT) :].tolist()}
    print(
        json.dumps(
            {
                "capability": torch.backends.cpu.get_cpu_capability(),
                "kinds": {name: kind for name, (kind, _) in results.items()},
                "ids": ids,
            }
        )
    )


if __name__ == "__main__":
    main()
