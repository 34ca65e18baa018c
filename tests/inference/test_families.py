"""The greedy output of every family equals that of transformers, for all kinds of batches and chunks.

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
from .harness import FAMILIES, VOCABULARY, Collected, run, save_model, step, submit


class Family:
    def __init__(self, name: str, folder: Path) -> None:
        self.folder = save_model(name, folder)
        self.runner = harness.RUNNER if name.endswith("wide") else "reference"
        # The default attention of some releases leaves out soft-capping.
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def engine(self, **settings: Any) -> Engine:
        return harness.make_engine(self.folder, runner=self.runner, **settings)

    def check_greedy(self, prompt: list[int], output: Collected, tokens: int = 12) -> None:
        """A position's logits depend on the tokens up to it only: one forward has those after each new token."""
        assert len(output.token_ids) == tokens
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *output.token_ids]]), use_cache=False).logits[0]
        assert output.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, VOCABULARY) for _ in range(source.randint(1, longest))] for _ in range(count)]


def test_output_is_the_same_alone_and_in_a_mixed_batch(family: Family) -> None:
    engine = family.engine(prefill_tokens=16)
    some = prompts(16, 60)
    alone = submit(engine, some[0])
    run(engine)
    together = [submit(engine, prompt) for prompt in some]
    run(engine)
    for prompt, output in zip([some[0], *some], [alone, *together], strict=True):
        family.check_greedy(prompt, output)


def test_prefix_cache_hits_do_not_change_output(family: Family) -> None:
    engine = family.engine(prefill_tokens=32)
    (shared,) = prompts(1, 1, seed=3)
    shared = shared * 30 + list(range(3, 24))
    same = [submit(engine, shared, choice=i) for i in range(4)]
    longer = {token: submit(engine, [*shared, token]) for token in (40, 41)}
    run(engine)
    family.check_greedy(shared, same[0])
    assert [output.token_ids for output in same] == [same[0].token_ids] * 4
    for token, output in longer.items():
        family.check_greedy([*shared, token], output)
    assert [output.final.usage.cached for output in same] == [0, 48, 48, 48]


def test_preemption_does_not_change_output(family: Family) -> None:
    engine = family.engine(prefill_tokens=16, kv_cache_tokens=96, max_context_tokens=96)
    some = prompts(6, 30, seed=5)
    outputs = [submit(engine, prompt, max_tokens=40) for prompt in some]
    run(engine)
    assert engine.scheduler.preemptions > 0
    for prompt, output in zip(some, outputs, strict=True):
        family.check_greedy(prompt, output, 40)


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
