"""The greedy output of every family equals `generate` of transformers, for all kinds of batches and chunks.

Families run by Hugging Face's code here, and those that are called wide by the kernels; test_native_families.py has the
kernels' other families.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from transformers import AutoModelForCausalLM

from . import harness
from .harness import FAMILIES, VOCABULARY, run, save_model, step, submit


class Family:
    def __init__(self, name: str, folder: Path) -> None:
        self.folder = save_model(name, folder)
        self.runner = harness.RUNNER if name.endswith("wide") else "reference"
        # The default attention of some releases leaves out soft-capping.
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def engine(self, **settings: Any) -> Engine:
        return harness.make_engine(self.folder, runner=self.runner, **settings)

    def generate(self, prompt: list[int], tokens: int = 12) -> list[int]:
        ids = torch.tensor([prompt])
        output: Any = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=2,
        )  # fmt: skip
        return list(output[0, len(prompt) :].tolist())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, VOCABULARY) for _ in range(source.randint(1, longest))] for _ in range(count)]


def test_output_is_the_same_alone_and_in_a_mixed_batch(family: Family) -> None:
    engine = family.engine(prefill_tokens=16)
    some = prompts(16, 60)
    expected = [family.generate(prompt) for prompt in some]

    alone = submit(engine, some[0])
    run(engine)
    assert alone.token_ids == expected[0]

    together = [submit(engine, prompt) for prompt in some]
    run(engine)
    assert [output.token_ids for output in together] == expected


def test_prefix_cache_hits_do_not_change_output(family: Family) -> None:
    engine = family.engine(prefill_tokens=32)
    (shared,) = prompts(1, 1, seed=3)
    shared = shared * 30 + list(range(3, 24))
    expected = family.generate(shared)
    same = [submit(engine, shared, choice=i) for i in range(4)]
    longer = [submit(engine, [*shared, token]) for token in (40, 41)]
    run(engine)
    assert [output.token_ids for output in same] == [expected] * 4
    assert [output.token_ids for output in longer] == [family.generate([*shared, token]) for token in (40, 41)]
    assert [output.final.usage.cached for output in same] == [0, 48, 48, 48]


def test_preemption_does_not_change_output(family: Family) -> None:
    engine = family.engine(prefill_tokens=16, kv_cache_tokens=96, max_context_tokens=96)
    some = prompts(6, 30, seed=5)
    outputs = [submit(engine, prompt, max_tokens=40) for prompt in some]
    run(engine)
    assert engine.scheduler.preemptions > 0
    assert [output.token_ids for output in outputs] == [family.generate(prompt, 40) for prompt in some]


def test_log_probabilities_of_prompt_and_output(family: Family) -> None:
    engine = family.engine(prefill_tokens=16)
    (prompt,) = prompts(1, 1, seed=9)
    prompt = prompt + list(range(5, 45))
    output = submit(engine, prompt, logprobs=3, echo=True)
    run(engine)
    ids = prompt + output.token_ids
    with torch.no_grad():
        expected = family.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    entries = output.logprobs
    assert [entry.token_id for entry in entries] == ids
    assert entries[0].logprob is None
    for position, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        best = expected[position].topk(3).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=1e-4)


def test_a_cancel_frees_slot_and_blocks_before_the_next_step(family: Family) -> None:
    engine = family.engine(max_sequences=1)
    running = submit(engine, [5, 6, 7], request_id="running", max_tokens=100)
    waiting = submit(engine, [5, 6, 7], request_id="waiting", max_tokens=100)
    for _ in range(5):
        step(engine)
    for request_id in ("waiting", "running"):
        assert engine.cancel(request_id) == 1
    engine.process_inbox()
    engine.deliver_now()
    assert engine.pool.used == 0
    assert [running.final.finish_reason, waiting.final.finish_reason] == ["cancelled"] * 2
    assert running.final.usage.completion == 5
