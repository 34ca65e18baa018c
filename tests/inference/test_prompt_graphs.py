"""Recorded steps with prompts give the output of the reference runner, in few recordings, whatever else they hold."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from engine.runners import graphs
from engine.runners.prompt_graphs import PromptGraphs
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence

from . import plain_tiles
from .async_engine import AsyncEngine
from .harness import VOCABULARY, Collected, make_engine, run, save_model, step, submit

SETTINGS: dict[str, Any] = {"max_sequences": 5, "prefill_tokens": 70, "dtype": "float32"}


def _generated(engine: Engine, seed: int) -> list[Collected]:
    """Prompts of several chunks, that come in while others decode; some are scored, which no recording does."""
    source, outputs = random.Random(seed), []
    for number in range(9):
        prompt = [source.randrange(3, VOCABULARY) for _ in range(source.choice((1, 5, 30, 150)))]
        parameters = {"logprobs": 1, "echo": number == 4} if number in (2, 4) else {}
        outputs.append(submit(engine, prompt, max_tokens=source.randrange(2, 12), ignore_eos=True, **parameters))
        for _ in range(source.randrange(3)):
            step(engine)
    run(engine)
    return outputs


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_prompts_in_chunks_beside_decoding_rows_give_the_reference_output(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(family, tmp_path / family)
    reference = make_engine(folder, runner="reference", **SETTINGS)
    plain_tiles.install(monkeypatch)
    tested = AsyncEngine(folder, **SETTINGS)
    prompts = tested.runner.prompt_graphs
    assert prompts is not None
    counts: list[int] = []
    run_recorded = prompts.run

    def counted(plan: list[Slice]) -> Any:
        counts.append(sum(piece.count for piece in plan))
        return run_recorded(plan)

    monkeypatch.setattr(prompts, "run", counted)
    for actual, expected in zip(_generated(tested.engine, 3), _generated(reference, 3), strict=True):
        assert actual.token_ids == expected.token_ids
        logprobs = [[entry.logprob for entry in output.logprobs] for output in (actual, expected)]
        assert logprobs[0] == [value if value is None else pytest.approx(value, abs=1e-4) for value in logprobs[1]]
    assert len(counts) > len(prompts.recordings) > 0
    assert set(prompts.recordings) <= set(prompts.shapes()) == {64, 96}


def test_a_step_that_does_not_fit_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_tiles.install(monkeypatch)
    runner = AsyncEngine(save_model("gpt2", tmp_path / "gpt2"), **SETTINGS).runner
    prompts = runner.prompt_graphs
    assert prompts is not None

    def supported(*counts: int, **attributes: Any) -> bool:
        plan = []
        for number, count in enumerate(counts):
            sequence = Sequence(list(range(count)), [1 + number], needs_every_row=False)
            plan.append(Slice(sequence, 0, count, attributes.get("draft_tokens", ())))  # type: ignore[arg-type]
            sequence.needs_every_row = attributes.get("needs_every_row", False)
        return prompts.supports(plan)

    assert supported(70, 1, 1, 1, 1)
    assert supported(20, 30)
    assert not supported(76)
    assert not supported(1, 1, 1, 1, 1, 2)
    assert not supported(9, needs_every_row=True)
    assert not supported(9, draft_tokens=(5,))


def test_there_are_no_recorded_prompts_where_attention_gathers_its_blocks(tmp_path: Path) -> None:
    runner = AsyncEngine(save_model("gpt2", tmp_path / "gpt2"), **SETTINGS).runner
    assert runner.prompt_graphs is None


def test_padding_reaches_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain_tiles` makes the attention of padding tokens NaN, so a row that read them would be NaN."""
    plain_tiles.install(monkeypatch)
    runner = AsyncEngine(save_model("llama", tmp_path / "llama"), **SETTINGS).runner
    assert isinstance(runner.prompt_graphs, PromptGraphs)
    sequences = [Sequence(list(range(3, 23)), [9, 4, 7, 2, 5], needs_every_row=False) for _ in range(2)]
    sequences[1].table.blocks = [11, 12, 13, 14, 15]
    plan = [Slice(sequence, 0, 20) for sequence in sequences]  # type: ignore[arg-type]
    with torch.inference_mode():
        first, second = runner.prompt_graphs.run(plan).logits.clone()
        later = runner.forward([Slice(sequences[0], 19, 1)]).logits[0]  # type: ignore[arg-type]
    assert first.isfinite().all()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(later, first)


def test_the_memory_of_recordings_is_estimated_from_two() -> None:
    taken, recorded = [0], []

    def record(number: int, size: int) -> Any:
        def compute() -> None:
            recorded.append(number)
            taken[0] += size

        return compute

    used = lambda: taken[0]  # noqa: E731
    assert graphs.measure([record(0, 900), record(1, 7), record(2, 7), record(3, 7)], used) == 900 + 3 * 7
    assert recorded == [0, 1]
    assert graphs.measure([record(0, 900)], used) == 900
