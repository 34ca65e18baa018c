"""Tokens that depend on the tokens before, chosen a step ahead: penalties, bans, log-probabilities and grammars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.output import step_output
from fakes.tiny_lm import make_checkpoint

from .async_engine import AsyncEngine, watched
from .harness import Collected, make_engine, make_text_engine, run, save_model, step, submit

GRAMMARS: tuple[dict[str, Any], ...] = (
    {"regex": "(ab|cd|é){3,9}[0-9]*"},
    {"json": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}},
    {"choice": ["left", "lefthand side", "right"]},
)
KINDS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 1.5, "temperature": 1.0},
    "presence": {"presence_penalty": 1.9, "temperature": 0.7},
    "bias": {"logit_bias": {"5": 4.0}, "temperature": 1.0},
    "banned": {"stop_token_ids": list(range(0, 96, 2)), "min_tokens": 9},
    "scored": {"logprobs": 3, "temperature": 1.0, "frequency_penalty": 0.8},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("ahead") / "gpt2")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llguidance", reason="a GPU machine lacks it; an engine without grammars runs without it")
    return make_checkpoint(tmp_path_factory.mktemp("ahead") / "lm")


def result(output: Collected) -> tuple[Any, ...]:
    logprobs = [(entry.token_id, pytest.approx(entry.logprob, abs=1e-4)) for entry in output.logprobs]
    tops = [[(i, pytest.approx(logprob, abs=1e-4)) for i, logprob in entry.top] for entry in output.logprobs]
    return output.token_ids, output.final.finish_reason, logprobs, tops


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_counts_before_it_reaches_the_host(gpt2: Path, kind: str) -> None:
    tested, reference = AsyncEngine(gpt2), make_engine(gpt2, runner="reference")
    results = []
    for engine in (tested.engine, reference):
        outputs = [submit(engine, [9] * n, max_tokens=25, seed=n, ignore_eos=True, **KINDS[kind]) for n in (2, 5, 7)]
        outputs.append(submit(engine, [3, 4], max_tokens=12, ignore_eos=True))
        run(engine)
        results.append([result(output) for output in outputs])
    assert results[0] == results[1]
    # The first step waits for nothing; with stop tokens the texts are shorter.
    assert tested.async_steps >= (8 if kind == "banned" else 24)


def test_a_token_counts_once_when_a_step_waits_for_the_one_before(gpt2: Path) -> None:
    """Between the two a new request is admitted, so the token that was counted ahead is appended before the next."""
    tested, reference = AsyncEngine(gpt2), make_engine(gpt2, runner="reference")
    results = []
    for engine in (tested.engine, reference):
        outputs = []
        for n in range(4):
            outputs.append(submit(engine, [8, n], max_tokens=20, ignore_eos=True, frequency_penalty=0.9))
            for _ in range(3):
                step(engine)
        run(engine)
        results.append([output.token_ids for output in outputs])
    assert results[0] == results[1]
    assert tested.async_steps > 10


def test_a_row_that_is_not_finite_ends_one_request(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = AsyncEngine(gpt2)
    lost, kept = (submit(tested.engine, [n], max_tokens=9, ignore_eos=True, presence_penalty=1.0) for n in (5, 6))
    step(tested.engine)
    forward_async = tested.runner.forward_async

    def spoiled(plan: Any, ids: torch.Tensor) -> Any:
        computed = forward_async(plan, ids)
        with torch.inference_mode():
            computed.logits[0] = torch.nan
        return computed

    monkeypatch.setattr(tested.runner, "forward_async", spoiled)
    step(tested.engine)
    monkeypatch.setattr(tested.runner, "forward_async", forward_async)
    run(tested.engine)
    assert "not finite" in str(lost.error)
    assert len(kept.token_ids) == 9


@pytest.mark.parametrize("forced_seconds", [0.002, 0.0])
def test_the_forward_of_a_constrained_step_runs_ahead_of_its_masks(
    text_model: Path, forced_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_output, "_FORCED_SECONDS", forced_seconds)
    ours, theirs = (make_text_engine(text_model, runner=runner)[0] for runner in ("graphs", "reference"))
    _, count = watched(ours)
    results = []
    for engine in (ours, theirs):
        outputs = []
        for seed, grammar in enumerate(GRAMMARS * 2):
            parameters = {"temperature": float(seed % 2), "frequency_penalty": 0.4 * (seed % 3), "logprobs": 1}
            outputs.append(
                submit(engine, [5, 6, 7], max_tokens=40, seed=seed, structured_outputs=grammar, **parameters)
            )
        # A request without a grammar shares the batch.
        outputs.append(submit(engine, [5, 6], max_tokens=30, presence_penalty=1.0, ignore_eos=True))
        run(engine)
        results.append([result(output) for output in outputs])
    assert results[0] == results[1]
    assert count[0] > 5


def test_a_constrained_request_that_is_cancelled_ahead_leaves_the_others(text_model: Path) -> None:
    ours, theirs = (make_text_engine(text_model, runner=runner)[0] for runner in ("graphs", "reference"))
    _, count = watched(ours)
    texts = []
    for engine in (ours, theirs):
        parameters: dict[str, Any] = {"structured_outputs": {"regex": "[a-z ]+"}, "max_tokens": 30, "temperature": 1.0}
        stays = submit(engine, [5, 6], **parameters)
        goes = submit(engine, [7, 8], request_id="goes", **parameters)
        for _ in range(4):
            step(engine)
        assert engine.cancel("goes") == 1
        run(engine)
        assert goes.final.finish_reason == "cancelled"
        texts.append(stays.token_ids)
    assert texts[0] == texts[1]
    assert count[0] > 3
