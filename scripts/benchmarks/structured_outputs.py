"""Throughput of an engine with structured outputs beside free text, in generated tokens/s at 32 requests.

    scripts/bench structured_outputs [--checkpoint FOLDER] [--requests 32] [--repetitions 3]

The same prompts are answered as free text, as text under a grammar that allows everything (the cost of masks alone),
and as JSON of a schema, with forced tokens and without. Modes alternate, because machines are noisy. Processor time is
printed beside it: other programs on the machine change it less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

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


class Speed(NamedTuple):
    """Tokens per second of time, and per second of all processors' time."""

    wall: float
    processor: float


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

    def measure(self, **parameters: Any) -> Speed:
        """All requests together, from the first step to the last; grammars are compiled before."""
        items: list[Item] = []
        self._engine.pool.forget_idle()
        for seed, prompt in enumerate(self._prompts):
            sent = {"temperature": 0.8, "max_tokens": MAX_TOKENS, "seed": seed, **parameters}
            generation = GenerationRequest(SamplingParameters.from_mapping(sent))
            self._engine.submit(Request("", prompt, generation, lambda item, last: items.append(item)))
        self._engine._intake.wait_for_prepared(60)
        began, processor_began = time.perf_counter(), time.process_time()
        self._engine.process_inbox()
        while self._engine.step():
            self._engine.deliver_now()
            self._engine.process_inbox()
        seconds, processor_seconds = time.perf_counter() - began, time.process_time() - processor_began
        tokens = sum(item.usage.completion for item in items if isinstance(item, Chunk) and item.finish_reason)
        return Speed(tokens / seconds, tokens / processor_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    bench = Bench(options.checkpoint or checkpoint(SMOLLM2), options.requests)
    forced_seconds = step_output._FORCED_SECONDS
    speeds: dict[str, list[Speed]] = defaultdict(list)
    # The first repetition only warms up.
    for repetition in range(1 + options.repetitions):
        for mode, parameters in MODES.items():
            step_output._FORCED_SECONDS = 0.0 if "one by one" in mode else forced_seconds
            speed = bench.measure(**parameters)
            if repetition:
                speeds[mode].append(speed)
    for mode, measured in speeds.items():
        pairs = list(zip(measured, speeds["free text"], strict=True))
        wall, processor = (statistics.median(one[n] / other[n] for one, other in pairs) for n in (0, 1))
        speed = statistics.median(one.wall for one in measured)
        print(f"{mode}: {speed:,.0f} tokens/s, {wall:.2f} of free text; {processor:.2f} per processor second")


if __name__ == "__main__":
    main()
