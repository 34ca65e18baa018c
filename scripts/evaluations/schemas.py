"""Evaluate structured outputs: constrained answers to realistic schemas, each checked by `jsonschema`.

    scripts/evaluate schemas [--schemas 300] [--answers 5] [--checkpoint FOLDER …]

Without a checkpoint two models answer: one with random weights, and SmolLM2-135M-Instruct. Every answer is valid, or
cut at max_tokens, or its schema is refused by the name of the keyword that is not supported. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import torch
from realistic_schemas import Schema, generate
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract import Checkpoint, Chunk, GenerationRequest, InvalidRequest, SamplingParameters

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "model_repository" / "generate" / "1"), str(ROOT / "scripts")]

from engine.config import EngineConfig  # noqa: E402
from engine.constraints.compiler import ConstraintCompiler  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.request import Item, Request  # noqa: E402
from engine.runners.interface import choose_devices  # noqa: E402
from engine.runners.select import open_runner  # noqa: E402
from real_checkpoints import SMOLLM2, checkpoint  # noqa: E402

# Its tokenizer has few tokens, so that random texts come to an end.
TOKENIZER = ROOT / "model_repository" / "fable" / "1" / "tokenizer.json"
CONTEXT, SLOTS = 2048, 64
# A line of progress for so many schemas.
PROGRESS = 25
VALID, CUT, REFUSED = "valid", "cut at max_tokens", "refused by name"


@dataclass
class Answer:
    schema: Schema
    # The keyword for which the schema must be refused; empty: it must be accepted.
    unsupported: str
    items: list[Item] = field(default_factory=list)

    def verdict(self, tokenizer: Tokenizer) -> str:
        last = self.items[-1]
        if isinstance(last, InvalidRequest):
            named = bool(self.unsupported) and self.unsupported in last.message
            return REFUSED if named else f"wrongly refused: {last.message}"
        if not isinstance(last, Chunk):
            return f"failed: {last}"
        if self.unsupported:
            return f"accepted in spite of {self.unsupported}"
        if last.finish_reason == "length":
            return CUT
        text = tokenizer.decode(last.token_ids)
        try:
            validator = jsonschema.Draft202012Validator
            validator(self.schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
        except (ValueError, jsonschema.ValidationError) as error:
            return f"invalid: {text!r}: {str(error).splitlines()[0]}"
        return VALID


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemas", type=int, default=300, help="number of schemas")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other schemas")
    parser.add_argument("--answers", type=int, default=5, help="answers to each schema")
    parser.add_argument("--max-tokens", type=int, default=400, help="tokens of an answer, at most")
    parser.add_argument("--checkpoint", type=Path, action="append", help="a model that answers instead of the two")
    options = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as work:
        folders = options.checkpoint or [_random_model(Path(work) / "random weights"), checkpoint(SMOLLM2)]
        for folder in folders:
            began = time.monotonic()
            schemas = list(generate(options.schemas, options.seed))
            verdicts = evaluate(folder, schemas, options.answers, options.max_tokens)
            counts = Counter(verdicts)
            shown = ", ".join(f"{counts.pop(name, 0)} {name}" for name in (VALID, REFUSED, CUT))
            print(f"{folder.name}: {options.schemas} schemas, {len(verdicts)} answers: {shown}, {counts.total()} wrong "
                  f"({time.monotonic() - began:.0f} s)")  # fmt: skip
            for verdict, count in counts.most_common(20):
                print(f"  {count} × {verdict}")
            passed &= not counts
    return 0 if passed else 1


def evaluate(folder: Path, schemas: Sequence[tuple[Schema, str]], answers: int, max_tokens: int) -> list[str]:
    """The verdict of each answer."""
    model, tokenizer = Checkpoint(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = EngineConfig(max_sequences=SLOTS, max_queue_size=SLOTS, max_context_tokens=CONTEXT)
    runner = open_runner(folder, config, choose_devices(config.device)[0])
    compiler = ConstraintCompiler(model.tokenizer_file, model.vocab_size, model.eos_token_ids)

    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    engine = Engine(runner, config, decode, model.eos_token_ids, constraints=compiler)
    engine.start()
    collected = []
    for number, (schema, unsupported) in enumerate(schemas):
        if number % PROGRESS == 0:
            print(f"{folder.name}: {number} of {len(schemas)} schemas submitted", file=sys.stderr, flush=True)
        prompt = tokenizer.encode(f"One {schema['title']} as JSON:\n").ids
        for seed in range(answers):
            collected.append(answer := Answer(schema, unsupported))
            while engine.in_flight >= SLOTS:
                time.sleep(0.005)
            engine.submit(_request(prompt, answer, seed, max_tokens))
    while engine.in_flight:
        time.sleep(0.01)
    engine.close()
    compiler.close()
    runner.close()
    return [answer.verdict(tokenizer) for answer in collected]


def _request(prompt: list[int], answer: Answer, seed: int, max_tokens: int) -> Request:
    sent: dict[str, Any] = {
        "structured_outputs": {"json": answer.schema}, "max_tokens": max_tokens, "seed": seed, "return_token_ids": True
    }  # fmt: skip
    generation = GenerationRequest(SamplingParameters.from_mapping(sent))
    return Request("", prompt, generation, lambda item, last: answer.items.append(item))


def _random_model(folder: Path) -> Path:
    """A small GPT-2 with random weights."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    end = Checkpoint(TOKENIZER.parent).eos_token_ids
    config = AutoConfig.for_model(
        "gpt2", vocab_size=tokenizer.get_vocab_size(), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=min(end), eos_token_id=min(end), initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


if __name__ == "__main__":
    os.environ.setdefault("TRITONLM_NATIVE_CACHE", str(ROOT / ".cache" / "native"))
    sys.exit(main())
