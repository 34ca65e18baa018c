"""With guesses ahead every text, log-probability and count is what it is without them, and steps are fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.engine import Engine
from engine.runners.native.runner import NativeRunner

from .harness import Collected, make_engine, run, save_model, step, submit

REPEATING = [5, 6, 7, 8, 9] * 5
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 60},
    "drawn": {"temperature": 0.4, "max_tokens": 60},
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
    return save_model(request.param, tmp_path_factory.mktemp("guesses"))


def answers(engine: Engine, prompts: list[list[int]], **parameters: Any) -> list[Any]:
    found = [submit(engine, prompt, choice=n, **parameters) for n, prompt in enumerate(prompts)]
    run(engine)
    return [(a.token_ids, a.final.finish_reason, a.final.usage, scores(a, engine)) for a in found]


def scores(answer: Collected, engine: Engine) -> list[Any]:
    """To the last bit where the kernels compute; products of other libraries may round several rows in other ways."""
    exact = isinstance(engine.runner, NativeRunner)

    def score(logprob: float | None) -> Any:
        return logprob if exact or logprob is None else pytest.approx(logprob, abs=1e-4)

    return [(e.token_id, score(e.logprob), [(i, score(p)) for i, p in e.top]) for e in answer.logprobs]


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_no_guesses(folder: Path, way: str) -> None:
    prompts = [REPEATING, [3, 4] * 9, [40, 41, 42]]
    plain, guessing = make_engine(folder), make_engine(folder, speculative_tokens=8)
    assert answers(guessing, prompts, **WAYS[way]) == answers(plain, prompts, **WAYS[way])


def test_each_right_guess_saves_a_step(folder: Path) -> None:
    plain, guessing = make_engine(folder), make_engine(folder, speculative_tokens=8)
    # Always, and not only where it pays by the clock.
    guessing._trial = None
    for prompt in (REPEATING, [3, 4] * 9, [40, 41, 42]):
        assert answers(guessing, [prompt], max_tokens=80) == answers(plain, [prompt], max_tokens=80)
    told = guessing.measures()
    assert 0 < told["rightly_guessed_tokens"] <= told["guessed_tokens"]
    assert told["steps"] == plain.measures()["steps"] - told["rightly_guessed_tokens"]


def test_a_pool_that_is_too_small_and_prompts_in_pieces_change_nothing(folder: Path) -> None:
    settings = {"prefill_tokens": 8, "kv_cache_tokens": 120, "max_context_tokens": 100}
    prompts = [[n, *REPEATING] for n in range(20, 26)]
    plain, guessing = make_engine(folder, **settings), make_engine(folder, speculative_tokens=15, **settings)
    assert answers(guessing, prompts, max_tokens=50) == answers(plain, prompts, max_tokens=50)
    assert guessing.scheduler.preemptions > 0


def test_who_leaves_with_guesses_under_way_leaves_nothing_behind(folder: Path) -> None:
    engine = make_engine(folder, speculative_tokens=8)
    answer = submit(engine, REPEATING, request_id="left", max_tokens=200, stream=True)
    for _ in range(12):
        step(engine)
    assert engine.cancel("left") == 1
    run(engine)
    assert answer.final.finish_reason == "cancelled"
    assert engine.pool.used == 0
