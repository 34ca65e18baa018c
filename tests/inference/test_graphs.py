"""Recorded decoding steps and asynchronous steps give the output of the reference runner.

Without a GPU, a recording here computes again at each replay and overwrites its first output, as a CUDA graph does.
Behaviour that needs a GPU is not tested.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from engine.runners import graphs
from engine.runners.graph_runner import GraphRunner
from engine.runners.interface import ForwardOutput
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence
from hypothesis import given
from hypothesis import strategies as st

from .async_engine import AsyncEngine, replayed
from .harness import VOCABULARY, Collected, make_engine, run, save_model, step, submit

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gpt_neox")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("graphs") / request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("async") / "gpt2")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_shape_holds_its_step_with_little_padding(rows: int, length: int) -> None:
    assert rows <= graphs.rows_of_shape(rows) < max(2 * rows, 2)
    assert rows <= 16 or graphs.rows_of_shape(rows) * 2 <= rows * 3
    padded = graphs.length_of_shape(length, 5000)
    assert length <= padded <= max(2 * length, 128)
    assert padded % 16 == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_has_the_logits_of_the_reference_runner(folder: Path, dtype: str) -> None:
    settings = {"dtype": dtype, "max_sequences": 8, "block_tokens": 4}
    ours, theirs = (make_engine(folder, runner=name, **settings).runner for name in ("graphs", "reference"))
    assert isinstance(ours, GraphRunner)
    ours._recorder = replayed
    source, block = random.Random(1), iter(range(1, 500))
    sequences = [
        Sequence([source.randrange(VOCABULARY) for _ in range(60)], [next(block) for _ in range(16)]) for _ in range(5)
    ]
    starts, ids = [3, 40, 17, 1, 26], {id(s): s.ids for s in sequences}
    for runner in (ours, theirs):
        runner.forward([Slice(s, 0, start) for s, start in zip(sequences, starts, strict=True)])  # type: ignore[arg-type]
    for further in range(12):
        for sequence, start in zip(sequences, starts, strict=True):
            sequence.ids, sequence.needs_every_row = ids[id(sequence)][: start + further + 1], False
        count = 1 + further % 5
        plan = [Slice(s, start + further, 1) for s, start in zip(sequences[:count], starts, strict=False)]  # type: ignore[arg-type]
        rest = [Slice(s, start + further, 1) for s, start in zip(sequences[count:], starts[count:], strict=True)]  # type: ignore[arg-type]
        for part in filter(None, (plan, rest)):
            with torch.inference_mode():
                actual, expected = ours.graphs.run(part).logits, theirs.forward(part).logits
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() <= (1e-4 if dtype == "float32" else 0.15) * expected.float().std()
    assert {rows for rows, _ in ours.graphs.recordings} == {1, 2, 4, 8}


def _mixed(engine: Engine, seed: int) -> list[Collected]:
    source, outputs = random.Random(seed), []
    for number in range(14):
        prompt = [source.randrange(VOCABULARY) for _ in range(source.randrange(1, 40))]
        parameters: dict[str, Any] = {
            "max_tokens": source.randrange(3, 40), "temperature": source.choice([0, 0, 1.0]), "seed": number,
            "top_p": source.choice([1.0, 0.8]), "top_k": source.choice([0, 5]),
        }  # fmt: skip
        kind = source.randrange(20)
        if kind == 0:
            parameters |= {"frequency_penalty": 0.5}
        elif kind == 1:
            parameters |= {"logprobs": 2}
        elif kind == 2:
            parameters |= {"stop": [f" {source.randrange(VOCABULARY)}"]}
        elif kind == 3:
            parameters |= {"stop_token_ids": [source.randrange(VOCABULARY) for _ in range(4)], "min_tokens": 3}
        elif kind == 4:
            parameters |= {"echo": True, "logprobs": 1}
        outputs.append(submit(engine, prompt, request_id=str(number), stream=source.random() < 0.5, **parameters))
        for _ in range(source.randrange(4)):
            step(engine)
    run(engine)
    return outputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [{}, {"max_sequences": 3}, {"kv_cache_tokens": 100, "max_context_tokens": 90}])
def test_mixed_requests_get_the_output_of_the_reference_runner(gpt2: Path, seed: int, settings: dict[str, Any]) -> None:
    tested, reference = AsyncEngine(gpt2, **settings), make_engine(gpt2, runner="reference", **settings)
    ours, theirs = _mixed(tested.engine, seed), _mixed(reference, seed)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.token_ids == expected.token_ids
        assert actual.final.finish_reason == expected.final.finish_reason
        assert [entry.token_id for entry in actual.logprobs] == [entry.token_id for entry in expected.logprobs]
    # With few blocks a request always waits for admission.
    assert tested.async_steps > 0 or "kv_cache_tokens" in settings


@pytest.mark.parametrize(
    ("parameters", "is_async"),
    [
        ({}, True), ({"temperature": 1.0, "top_p": 0.9}, True), ({"stop": ["zzz"]}, True),
        ({"logprobs": 1}, True), ({"repetition_penalty": 1.2}, True), ({"presence_penalty": 0.1}, True),
        ({"logit_bias": {"5": 1.0}}, True), ({"min_tokens": 20, "stop_token_ids": [7]}, True),
    ],
)  # fmt: skip
def test_all_requests_of_one_token_a_step_run_asynchronously(
    gpt2: Path, parameters: dict[str, Any], is_async: bool
) -> None:
    tested = AsyncEngine(gpt2)
    submit(tested.engine, [1, 2, 3], max_tokens=20, ignore_eos=True, **parameters)
    run(tested.engine)
    # All steps but the first one, and none after the last one.
    assert tested.async_steps == (19 if is_async else 0)


def test_a_request_removed_during_an_async_step_ends_once(gpt2: Path) -> None:
    tested, alone = AsyncEngine(gpt2), make_engine(gpt2, runner="reference")
    stays = submit(tested.engine, [5, 6], max_tokens=30)
    goes = submit(tested.engine, [7, 8], max_tokens=30, request_id="goes")
    late = submit(tested.engine, [9, 10], max_tokens=30)
    for _ in range(5):
        step(tested.engine)
    assert tested.engine.cancel("goes") == 1
    next(r for r in tested.engine.scheduler.running if r.prompt_ids == [9, 10]).deadline = 0.0
    tested.engine.deliver_now()
    run(tested.engine)
    expected = submit(alone, [5, 6], max_tokens=30)
    run(alone)
    assert stays.token_ids == expected.token_ids
    assert (goes.final.finish_reason, late.final.finish_reason) == ("cancelled", "timeout")
    assert tested.async_steps > 0


def test_a_failed_async_step_fails_its_requests_only(gpt2: Path) -> None:
    tested = AsyncEngine(gpt2)
    engine, forward_async = tested.engine, tested.runner.forward_async

    def fails(plan: Any, ids: torch.Tensor) -> ForwardOutput:
        raise RuntimeError("out of memory")

    lost = submit(engine, [1, 2], max_tokens=9)
    tested.runner.forward_async = fails  # type: ignore[method-assign]
    engine.try_step()
    engine.deliver_now()
    assert "RuntimeError" in str(lost.error)
    tested.runner.forward_async = forward_async  # type: ignore[method-assign]
    after, reference = submit(engine, [1, 2], max_tokens=9), make_engine(gpt2, runner="reference")
    expected = submit(reference, [1, 2], max_tokens=9)
    run(engine)
    run(reference)
    assert after.token_ids == expected.token_ids


def test_steps_that_cannot_be_recorded_run_without_recordings(gpt2: Path, caplog: pytest.LogCaptureFixture) -> None:
    tested, reference = AsyncEngine(gpt2), make_engine(gpt2, runner="reference")

    def refuses(compute: graphs.Compute) -> graphs.Compute:
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    tested.runner._recorder = refuses
    actual, expected = (submit(engine, [1, 2], max_tokens=9) for engine in (tested.engine, reference))
    run(tested.engine)
    run(reference)
    assert actual.token_ids == expected.token_ids
    (record,) = caplog.records
    assert record.getMessage().startswith("this model's steps cannot be recorded")


def test_prepared_shapes_are_not_recorded_again(gpt2: Path) -> None:
    tested, reference = AsyncEngine(gpt2, max_sequences=5), make_engine(gpt2, runner="reference", max_sequences=5)
    tested.runner.prepare(5)
    prepared = dict(tested.runner.graphs.recordings)
    assert {rows for rows, _ in prepared} == {1, 2, 4, 8}
    for actual, expected in zip(_mixed(tested.engine, 1), _mixed(reference, 1), strict=True):
        assert actual.token_ids == expected.token_ids
    assert tested.async_steps > 0
    assert tested.runner.graphs.recordings == prepared


def test_a_prompt_of_one_token_a_step_leaves_the_rows_after_it_as_they_are(gpt2: Path) -> None:
    outputs = []
    for runner in ("graphs", "reference"):
        engine = make_engine(gpt2, runner=runner, prefill_tokens=1)
        decoding = submit(engine, [5], max_tokens=20, ignore_eos=True)
        step(engine)
        # Its rank is better, so its slices come first.
        prompt = submit(engine, [7, 8, 9, 10, 11, 12], max_tokens=5, ignore_eos=True, priority=1)
        run(engine)
        outputs.append((decoding.token_ids, prompt.token_ids))
    assert outputs[0] == outputs[1]


def test_one_long_context_does_not_exceed_the_gather_buffer(gpt2: Path) -> None:
    settings: dict[str, Any] = {"max_sequences": 16, "kv_cache_tokens": 256, "max_context_tokens": 250}
    tested, reference = AsyncEngine(gpt2, **settings), make_engine(gpt2, runner="reference", **settings)
    outputs = []
    for engine in (tested.engine, reference):
        prompts = [([3] * 150, 40), *(([5, number], 6) for number in range(9))]
        outputs.append([submit(engine, prompt, max_tokens=count, ignore_eos=True) for prompt, count in prompts])
        run(engine)
    assert [output.token_ids for output in outputs[0]] == [expected.token_ids for expected in outputs[1]]
    shapes = tested.runner.graphs.recordings
    # Alone the long context has a recording and runs asynchronously; in a batch its steps run without.
    assert (1, 256) in shapes
    assert tested.async_steps > 0
    assert all(rows * length <= 2 * 260 for rows, length in shapes)


def test_a_new_request_is_admitted_after_one_async_step(gpt2: Path) -> None:
    tested = AsyncEngine(gpt2)
    submit(tested.engine, [1, 2], max_tokens=60)
    for _ in range(5):
        step(tested.engine)
    late = submit(tested.engine, [3], max_tokens=2, stream=True)
    # One step is in flight. The next step includes the new request.
    for _ in range(2):
        step(tested.engine)
    assert len(late.items) == 1
    run(tested.engine)
    assert len(late.token_ids) == 2
