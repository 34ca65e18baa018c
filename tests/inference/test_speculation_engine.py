"""Speculative decoding leaves every text, log-probability and count unchanged, and needs fewer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.engine import Engine
from engine.runners.native.runner import NativeRunner

from .harness import Collected, make_engine, run, save_model, step, submit

REPEATING = [5, 6, 7, 8, 9] * 5
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 60},
    "sampled": {"temperature": 0.4, "max_tokens": 60},
    "filtered": {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "max_tokens": 60},
    "penalised": {"frequency_penalty": 0.3, "presence_penalty": 0.1, "repetition_penalty": 1.1, "max_tokens": 60},
    "scored": {"logprobs": 2, "echo": True, "max_tokens": 40},
    "stopped": {"stop": [" 30 ", " 7"], "max_tokens": 60, "min_tokens": 5},
    "biased": {"logit_bias": {"8": 4.0}, "max_tokens": 40},
    "short": {"max_tokens": 1},
    "resumed": {"resume_token_ids": [9, 5, 6, 7], "max_tokens": 40},
}


@pytest.fixture(scope="module", params=["gpt2", "llama wide"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("speculation"))


def results(engine: Engine, prompts: list[list[int]], **parameters: Any) -> list[Any]:
    outputs = [submit(engine, prompt, choice=n, **parameters) for n, prompt in enumerate(prompts)]
    run(engine)
    return [(o.token_ids, o.final.finish_reason, o.final.usage, logprobs(o, engine)) for o in outputs]


def logprobs(output: Collected, engine: Engine) -> list[Any]:
    """Exact for the native kernels. The matmuls of other libraries may round a batch of rows differently."""
    exact = isinstance(engine.runner, NativeRunner)

    def value(logprob: float | None) -> Any:
        return logprob if exact or logprob is None else pytest.approx(logprob, abs=1e-4)

    return [(e.token_id, value(e.logprob), [(i, value(p)) for i, p in e.top]) for e in output.logprobs]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_without_draft_tokens(folder: Path, case: str) -> None:
    prompts = [REPEATING, [3, 4] * 9, [40, 41, 42]]
    plain, speculative = make_engine(folder), make_engine(folder, speculative_tokens=8)
    assert results(speculative, prompts, **CASES[case]) == results(plain, prompts, **CASES[case])


def test_each_accepted_token_saves_a_step(folder: Path) -> None:
    plain, speculative = make_engine(folder), make_engine(folder, speculative_tokens=8)
    # Propose drafts in every step, and not only where they pay off.
    speculative._speculation_gate = None
    for prompt in (REPEATING, [3, 4] * 9, [40, 41, 42]):
        assert results(speculative, [prompt], max_tokens=80) == results(plain, [prompt], max_tokens=80)
    values = speculative.metric_values()
    accepted = values["speculative_accepted_tokens"]
    assert 0 < accepted <= values["speculative_draft_tokens"]
    assert values["steps"] == plain.metric_values()["steps"] - accepted
    assert values["rightly_guessed_tokens"] == accepted, "the former name has the same value"


def test_a_small_pool_and_chunked_prompts_change_nothing(folder: Path) -> None:
    settings = {"prefill_tokens": 8, "kv_cache_tokens": 120, "max_context_tokens": 100}
    prompts = [[n, *REPEATING] for n in range(20, 26)]
    plain, speculative = make_engine(folder, **settings), make_engine(folder, speculative_tokens=15, **settings)
    assert results(speculative, prompts, max_tokens=50) == results(plain, prompts, max_tokens=50)
    assert speculative.scheduler.preemptions > 0


def test_a_request_cancelled_with_draft_tokens_frees_its_blocks(folder: Path) -> None:
    engine = make_engine(folder, speculative_tokens=8)
    output = submit(engine, REPEATING, request_id="left", max_tokens=200, stream=True)
    for _ in range(12):
        step(engine)
    assert engine.cancel("left") == 1
    run(engine)
    assert output.final.finish_reason == "cancelled"
    assert engine.pool.used == 0
