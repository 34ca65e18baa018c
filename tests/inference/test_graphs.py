"""Recorded decoding steps, and steps on tokens that nobody has seen yet, against the reference's steps one by one.

There is no GPU here: a recording computes anew at each replay, into the memory that it gave the first time, as a CUDA
graph does. What only a GPU can show is not shown.
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
from engine.runners.interface import Computed
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence
from hypothesis import given
from hypothesis import strategies as st

from .harness import VOCABULARY, Collected, make_engine, run, save_model, step, submit

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gpt_neox")


def replayed(compute: graphs.Compute) -> graphs.Compute:
    """As a CUDA graph: what it gave is overwritten by the next replay."""
    given = compute()
    kept = Computed(given.logits.clone(), given.hidden.clone())

    def replay() -> Computed:
        found = compute()
        kept.logits.copy_(found.logits)
        kept.hidden.copy_(found.hidden)
        return kept

    return replay


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("graphs") / request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("ahead") / "gpt2")


class Watched:
    """An engine with recordings, and how often it went ahead."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.engine: Engine = make_engine(folder, **{"runner": "graphs", **settings})
        runner = self.engine.runner
        assert isinstance(runner, GraphRunner)
        runner._recorder = replayed
        self.runner, self.ahead = runner, 0
        forward_after = runner.forward_after

        def counted(plan: Any, ids: torch.Tensor) -> Computed:
            self.ahead += 1
            return forward_after(plan, ids)

        runner.forward_after = counted  # type: ignore[method-assign]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_shape_holds_its_step_with_little_to_spare(rows: int, length: int) -> None:
    assert rows <= graphs.rows_of_shape(rows) < max(2 * rows, 2)
    assert rows <= 16 or graphs.rows_of_shape(rows) * 2 <= rows * 3
    found = graphs.length_of_shape(length, 5000)
    assert length <= found <= max(2 * length, 128)
    assert found % 16 == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_gives_the_logits_of_the_reference(folder: Path, dtype: str) -> None:
    settings = {"dtype": dtype, "max_sequences": 8, "block_tokens": 4}
    ours, theirs = (make_engine(folder, runner=name, **settings).runner for name in ("graphs", "reference"))
    assert isinstance(ours, GraphRunner)
    ours._recorder = replayed
    draw, block = random.Random(1), iter(range(1, 500))
    sequences = [
        Sequence([draw.randrange(VOCABULARY) for _ in range(60)], [next(block) for _ in range(16)]) for _ in range(5)
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
                found, expected = ours.graphs.run(part).logits, theirs.forward(part).logits
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= (1e-4 if dtype == "float32" else 0.15) * expected.float().std()
    assert {rows for rows, _ in ours.graphs.recordings} == {1, 2, 4, 8}


def _mixed(engine: Engine, seed: int) -> list[Collected]:
    draw, found = random.Random(seed), []
    for number in range(14):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 40))]
        wanted: dict[str, Any] = {
            "max_tokens": draw.randrange(3, 40), "temperature": draw.choice([0, 0, 1.0]), "seed": number,
            "top_p": draw.choice([1.0, 0.8]), "top_k": draw.choice([0, 5]),
        }  # fmt: skip
        kind = draw.randrange(20)
        if kind == 0:
            wanted |= {"frequency_penalty": 0.5}
        elif kind == 1:
            wanted |= {"logprobs": 2}
        elif kind == 2:
            wanted |= {"stop": [f" {draw.randrange(VOCABULARY)}"]}
        elif kind == 3:
            wanted |= {"stop_token_ids": [draw.randrange(VOCABULARY) for _ in range(4)], "min_tokens": 3}
        elif kind == 4:
            wanted |= {"echo": True, "logprobs": 1}
        found.append(submit(engine, prompt, request_id=str(number), stream=draw.random() < 0.5, **wanted))
        for _ in range(draw.randrange(4)):
            step(engine)
    run(engine)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [{}, {"max_sequences": 3}, {"kv_cache_tokens": 100, "max_context_tokens": 90}])
def test_a_crowd_gets_what_it_gets_step_by_step(gpt2: Path, seed: int, settings: dict[str, Any]) -> None:
    watched, reference = Watched(gpt2, **settings), make_engine(gpt2, runner="reference", **settings)
    ours, theirs = _mixed(watched.engine, seed), _mixed(reference, seed)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.token_ids == expected.token_ids
        assert found.final.finish_reason == expected.final.finish_reason
        assert [entry.token_id for entry in found.logprobs] == [entry.token_id for entry in expected.logprobs]
    # Where blocks are short somebody always waits to be let in.
    assert watched.ahead > 0 or "kv_cache_tokens" in settings


@pytest.mark.parametrize(
    ("wanted", "goes"),
    [
        ({}, True), ({"temperature": 1.0, "top_p": 0.9}, True), ({"stop": ["zzz"]}, True),
        ({"logprobs": 1}, False), ({"repetition_penalty": 1.2}, False), ({"presence_penalty": 0.1}, False),
        ({"logit_bias": {"5": 1.0}}, False), ({"min_tokens": 20, "stop_token_ids": [7]}, False),
    ],
)  # fmt: skip
def test_only_plain_sequences_go_ahead(gpt2: Path, wanted: dict[str, Any], goes: bool) -> None:
    watched = Watched(gpt2)
    submit(watched.engine, [1, 2, 3], max_tokens=20, ignore_eos=True, **wanted)
    run(watched.engine)
    # All but the first, which nobody launched another one before, and none beyond the last.
    assert watched.ahead == (19 if goes else 0)


def test_who_is_taken_out_in_flight_ends_once_and_disturbs_nobody(gpt2: Path) -> None:
    watched, alone = Watched(gpt2), make_engine(gpt2, runner="reference")
    stays = submit(watched.engine, [5, 6], max_tokens=30)
    goes = submit(watched.engine, [7, 8], max_tokens=30, request_id="goes")
    late = submit(watched.engine, [9, 10], max_tokens=30)
    for _ in range(5):
        step(watched.engine)
    assert watched.engine.cancel("goes") == 1
    next(r for r in watched.engine.scheduler.running if r.prompt_ids == [9, 10]).deadline = 0.0
    watched.engine.deliver_now()
    run(watched.engine)
    expected = submit(alone, [5, 6], max_tokens=30)
    run(alone)
    assert stays.token_ids == expected.token_ids
    assert (goes.final.finish_reason, late.final.finish_reason) == ("cancelled", "timeout")
    assert watched.ahead > 0


def test_a_failure_in_flight_fails_its_requests_and_nothing_after_them(gpt2: Path) -> None:
    watched = Watched(gpt2)
    engine, forward_after = watched.engine, watched.runner.forward_after

    def fails(plan: Any, ids: torch.Tensor) -> Computed:
        raise RuntimeError("out of memory")

    lost = submit(engine, [1, 2], max_tokens=9)
    watched.runner.forward_after = fails  # type: ignore[method-assign]
    engine.try_step()
    engine.deliver_now()
    assert "RuntimeError" in str(lost.error)
    watched.runner.forward_after = forward_after  # type: ignore[method-assign]
    after, reference = submit(engine, [1, 2], max_tokens=9), make_engine(gpt2, runner="reference")
    expected = submit(reference, [1, 2], max_tokens=9)
    run(engine)
    run(reference)
    assert after.token_ids == expected.token_ids


def test_what_cannot_be_recorded_is_computed_step_by_step(gpt2: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched, reference = Watched(gpt2), make_engine(gpt2, runner="reference")

    def refuses(compute: graphs.Compute) -> graphs.Compute:
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    watched.runner._recorder = refuses
    found, expected = (submit(engine, [1, 2], max_tokens=9) for engine in (watched.engine, reference))
    run(watched.engine)
    run(reference)
    assert found.token_ids == expected.token_ids
    (said,) = caplog.records
    assert said.getMessage().startswith("this model's steps cannot be recorded")


def test_what_has_been_prepared_is_not_recorded_again(gpt2: Path) -> None:
    watched, reference = Watched(gpt2, max_sequences=5), make_engine(gpt2, runner="reference", max_sequences=5)
    watched.runner.prepare(5)
    prepared = dict(watched.runner.graphs.recordings)
    assert {rows for rows, _ in prepared} == {1, 2, 4, 8}
    for found, expected in zip(_mixed(watched.engine, 1), _mixed(reference, 1), strict=True):
        assert found.token_ids == expected.token_ids
    assert watched.ahead > 0
    assert watched.runner.graphs.recordings == prepared


def test_one_long_context_does_not_make_many_short_ones_read_beyond_what_there_is(gpt2: Path) -> None:
    settings: dict[str, Any] = {"max_sequences": 16, "kv_cache_tokens": 256, "max_context_tokens": 250}
    watched, reference = Watched(gpt2, **settings), make_engine(gpt2, runner="reference", **settings)
    answers = []
    for engine in (watched.engine, reference):
        asked = [([3] * 150, 40), *(([5, number], 6) for number in range(9))]
        answers.append([submit(engine, prompt, max_tokens=count, ignore_eos=True) for prompt, count in asked])
        run(engine)
    assert [found.token_ids for found in answers[0]] == [expected.token_ids for expected in answers[1]]
    shapes = watched.runner.graphs.recordings
    # Alone it has its recording, and goes ahead; among the others steps are computed one by one.
    assert (1, 256) in shapes
    assert watched.ahead > 0
    assert all(rows * length <= 2 * 260 for rows, length in shapes)


def test_a_request_that_comes_is_not_kept_waiting_by_those_ahead(gpt2: Path) -> None:
    watched = Watched(gpt2)
    submit(watched.engine, [1, 2], max_tokens=60)
    for _ in range(5):
        step(watched.engine)
    comes = submit(watched.engine, [3], max_tokens=2, stream=True)
    # One step is under way; the next one has it.
    for _ in range(2):
        step(watched.engine)
    assert len(comes.items) == 1
    run(watched.engine)
    assert len(comes.token_ids) == 2
