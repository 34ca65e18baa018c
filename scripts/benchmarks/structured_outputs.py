"""Throughput of an engine with structured outputs beside free text, in generated tokens/s at 32 requests.

    scripts/bench structured_outputs [--checkpoint FOLDER] [--requests 32] [--repetitions 3]

The same prompts are answered as free text, as text under a grammar that allows everything (the cost of masks alone),
and as JSON of a schema, with forced tokens and without. Modes alternate, because machines are noisy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tritonlm.contract import Checkpoint, Chunk, GenerationRequest, SamplingParameters

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "model_repository" / "generate" / "1"), str(ROOT / "scripts")]

from engine.config import EngineConfig  # noqa: E402
from engine.constraints.compiler import ConstraintCompiler  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.output import step_output  # noqa: E402
from engine.request import Item, Request  # noqa: E402
from engine.runners.interface import choose_devices  # noqa: E402
from engine.runners.select import open_runner  # noqa: E402
from real_checkpoints import SMOLLM2, checkpoint  # noqa: E402

MAX_TOKENS, CONTEXT = 120, 1024
_TEXT = {"type": "string", "maxLength": 40}
CUSTOMER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": _TEXT, "email": _TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "employment_status": {"enum": ["employed", "unemployed", "self-employed", "retired"]},
        "street_address": _TEXT, "postal_code": {"type": "string", "maxLength": 10},
        "is_subscribed": {"type": "boolean"},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    },
    "additionalProperties": False,
}  # fmt: skip
CUSTOMER["required"] = list(CUSTOMER["properties"])
SCHEMA, ANYTHING = {"json": CUSTOMER}, {"regex": "[\\s\\S]*"}
MODES: dict[str, dict[str, Any]] = {
    "free text": {"ignore_eos": True},
    "a grammar of any text": {"ignore_eos": True, "structured_outputs": ANYTHING},
    "a schema": {"structured_outputs": SCHEMA},
    "a schema, one by one": {"structured_outputs": SCHEMA},
}


class Bench:
    def __init__(self, folder: Path, requests: int) -> None:
        model, tokenizer = Checkpoint(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = EngineConfig(max_sequences=requests, max_queue_size=requests, max_context_tokens=CONTEXT)
        ends = model.eos_token_ids
        self._engine = Engine(
            open_runner(folder, config, choose_devices(config.device)[0]), config,
            lambda ids, skip: str(tokenizer.decode(ids, skip_special_tokens=skip)), ends,
            constraints=ConstraintCompiler(model.tokenizer_file, model.vocab_size, ends),
        )  # fmt: skip
        self._prompts = [
            tokenizer.encode(f"Write a JSON record of customer number {n} of the shop:\n").ids for n in range(requests)
        ]

    def tokens_per_second(self, **parameters: Any) -> float:
        """All requests together, from the first step to the last; grammars are compiled before."""
        items: list[Item] = []
        self._engine.pool.forget_idle()
        for seed, prompt in enumerate(self._prompts):
            sent = {"temperature": 0.8, "max_tokens": MAX_TOKENS, "seed": seed, **parameters}
            generation = GenerationRequest(SamplingParameters.from_mapping(sent))
            self._engine.submit(Request("", prompt, generation, lambda item, last: items.append(item)))
        self._engine._intake.wait_for_prepared()
        began = time.perf_counter()
        self._engine.process_inbox()
        while self._engine.step():
            self._engine.deliver_now()
            self._engine.process_inbox()
        seconds = time.perf_counter() - began
        return sum(item.usage.completion for item in items if isinstance(item, Chunk)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    bench = Bench(options.checkpoint or checkpoint(SMOLLM2), options.requests)
    forced_seconds = step_output._FORCED_SECONDS
    speeds: dict[str, list[float]] = defaultdict(list)
    # The first repetition only warms up.
    for repetition in range(1 + options.repetitions):
        for mode, parameters in MODES.items():
            step_output._FORCED_SECONDS = 0.0 if "one by one" in mode else forced_seconds
            speed = bench.tokens_per_second(**parameters)
            if repetition:
                speeds[mode].append(speed)
    free = speeds["free text"]
    for mode, measured in speeds.items():
        ratio = statistics.median(one / other for one, other in zip(measured, free, strict=True))
        print(f"{mode}: {statistics.median(measured):,.0f} tokens/s, {ratio:.2f} of free text")


if __name__ == "__main__":
    main()
