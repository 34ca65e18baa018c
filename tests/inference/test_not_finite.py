"""A model whose numbers are not finite for one request: that request fails, and leaves nothing behind for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from engine.request import Request
from safetensors.torch import load_file, save_file
from tritonlm.contract import EngineFailure, GenerationRequest, SamplingParameters

from .harness import Collected, make_engine, run, save_model, step, submit

# The embedding of this token is NaN.
POISON = 9
# Four blocks of four tokens.
SHARED = [5, 6, 7, 8] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("llama wide", tmp_path_factory.mktemp("llama"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def engine(folder: Path) -> Engine:
    return make_engine(folder)


def submit_good(engine: Engine) -> Collected:
    return submit(engine, [*SHARED, 10], max_tokens=20, logit_bias={str(POISON): -100})


def check_failed(output: Collected) -> None:
    assert isinstance(output.error, EngineFailure)
    assert "not finite" in output.error.message


def test_nan_logits_fail_the_request(engine: Engine) -> None:
    outputs = [submit(engine, [5, POISON, 7]) for _ in range(2)]
    run(engine)
    for output in outputs:
        check_failed(output)


def test_a_request_that_shares_the_prefix_of_a_failed_one_goes_on_unchanged(engine: Engine) -> None:
    alone = submit_good(engine)
    run(engine)
    engine.pool.forget_idle()
    beside = submit_good(engine)
    step(engine)
    failed = submit(engine, [*SHARED, POISON, 11, 12, 13, 14])
    while not failed.items:
        step(engine)
    check_failed(failed)
    assert not beside.ends
    run(engine)
    assert beside.token_ids == alone.token_ids
    after = submit_good(engine)
    run(engine)
    assert after.final.usage.cached == len(SHARED)
    assert after.token_ids == alone.token_ids


def test_the_blocks_of_a_failed_request_are_not_reused_as_a_prefix(engine: Engine) -> None:
    prompt = [*SHARED, POISON, 11, 12, 13, 14]
    output = submit(engine, prompt)
    run(engine)
    check_failed(output)
    assert engine.pool.idle == 0
    assert engine.pool.match(prompt).blocks == []


def test_an_embedding_that_is_not_finite_fails_and_leaves_no_prefix(folder: Path) -> None:
    engine = make_engine(folder, enable_embeddings=True, prefill_tokens=8)
    params = SamplingParameters.from_mapping({"max_tokens": 0, "echo": True, "seed": 0})
    # A prompt of three steps.
    prompt, output = [POISON, *SHARED, 10], Collected()
    engine.submit(Request("", prompt, GenerationRequest(params, embed=True), output.deliver))
    run(engine)
    check_failed(output)
    assert engine.pool.match(prompt).blocks == []
    counted = engine.reports.status()
    assert (counted["finished"], counted["failed"]) == (0, 1)


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_a_prompt_score_that_is_not_finite_fails_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    project = engine.runner.project

    def poisoned(computed: Any, rows: Any) -> Iterator[torch.Tensor]:
        for logits in project(computed, rows):
            changed = logits.clone()
            changed[2] = float("inf")
            yield changed

    monkeypatch.setattr(engine.runner, "project", poisoned)
    # The row belongs to the first prompt of the step.
    failed, beside = (
        submit(engine, [first, *SHARED], echo=True, logprobs=0, max_tokens=max_tokens) for first in (10, 11)
    )
    run(engine)
    check_failed(failed)
    assert len(beside.logprobs) == 1 + len(SHARED) + max_tokens
    assert engine.pool.match([10, *SHARED]).blocks == []
    assert len(engine.pool.match([11, *SHARED]).blocks) == 4
