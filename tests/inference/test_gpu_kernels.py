"""The GPU's attention kernels, interpreted on the CPU, give the output of the reference, alone and in an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.runners import attention, flat_batch
from engine.runners.gpu import block_attention, query_tiles, self_check
from engine.runners.graph_runner import GraphRunner
from engine.runners.kv_cache import KVCache, LayerShape
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence

from .harness import make_engine, run, save_model, submit
from .triton_interpreter import interpreter, needs_triton  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
pytestmark = needs_triton


class Layer(torch.nn.Module):
    layer_idx = 0


class Step:
    """A mixed step: three decoding sequences, a whole prompt, and the later chunk of another."""

    LENGTHS = ((37, 1), (0, 1), (90, 1), (0, 21), (13, 9))
    BLOCK_TOKENS = 4

    def __init__(self, heads: int, shape: LayerShape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        blocks = iter((torch.randperm(99) + 1).tolist())
        self.shape, self.dtype = shape, dtype
        self.plan: list[Slice] = []
        self.context: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for start, count in self.LENGTHS:
            length = start + count
            own = [next(blocks) for _ in range(-(-length // self.BLOCK_TOKENS))]
            self.plan.append(Slice(Sequence(list(range(length)), own), start, count))  # type: ignore[arg-type]
            slots = torch.tensor([block * self.BLOCK_TOKENS + n for block in own for n in range(self.BLOCK_TOKENS)])
            self.context.append((slots[:start], self._keys(start), self._values(start)))
        rows = sum(count for _, count in self.LENGTHS)
        # As Hugging Face's code passes them: (1, heads, rows, width), in the memory order of (1, rows, heads, width).
        self.query = torch.randn(1, rows, heads, shape.key_width).to(dtype).transpose(1, 2)
        self.keys, self.values = self._keys(rows)[None].transpose(1, 2), self._values(rows)[None].transpose(1, 2)

    def _keys(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.shape.heads, self.shape.key_width).to(self.dtype)

    def _values(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.shape.heads, self.shape.value_width).to(self.dtype)

    def output(self, tile_rows: int, window: int | None, softcap: float | None) -> tuple[torch.Tensor, KVCache]:
        cache = KVCache([self.shape], 100, self.BLOCK_TOKENS, self.dtype, CPU)
        for slots, keys, values in self.context:
            cache.write(0, slots, keys, values)
        batch = flat_batch.build(self.plan, self.BLOCK_TOKENS, self.dtype, CPU, tile_rows)
        assert bool(batch.tiles) == bool(tile_rows)
        paged = attention.Paged(batch, cache)
        arguments = (self.query, self.keys, self.values, None, None, window, softcap, paged)
        return attention.paged_attention(Layer(), *arguments)[0], cache


@pytest.mark.parametrize(
    ("heads", "shape", "window", "softcap", "dtype"),
    [
        (2, LayerShape(2, 16, 16), None, None, torch.float32),
        (6, LayerShape(2, 24, 8), 5, None, torch.float32),
        (4, LayerShape(1, 32, 40), None, 3.0, torch.float32),
        (4, LayerShape(2, 64, 64), 70, 30.0, torch.float16),
    ],
)
@pytest.mark.parametrize("splits", [1, 4])
def test_a_mixed_step_has_the_output_of_gathered_attention(
    heads: int, shape: LayerShape, window: int | None, softcap: float | None, dtype: torch.dtype, splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(block_attention, "_splits", lambda *_: splits)
    step = Step(heads, shape, dtype)
    expected, written = step.output(0, window, softcap)
    actual, cache = step.output(query_tiles.tile_rows(heads // shape.heads, torch.float32) // 2, window, softcap)
    assert torch.equal(cache.keys[0], written.keys[0])
    assert torch.equal(cache.values[0], written.values[0])
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, **({} if dtype == torch.float32 else {"atol": 5e-3, "rtol": 0.0}))


def test_stale_numbers_behind_a_sequence_do_not_reach_it() -> None:
    step = Step(2, LayerShape(1, 16, 16), torch.float32)
    expected, _ = step.output(0, None, None)
    unused = torch.arange(0, Step.BLOCK_TOKENS)
    nan = torch.full((len(unused), 1, 16), float("nan"))
    step.context.append((unused, nan, nan))
    torch.testing.assert_close(step.output(16, None, None)[0], expected)


def test_the_self_check_accepts_the_kernels_and_refuses_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        num_attention_heads, sliding_window, attn_logit_softcapping = 4, None, None

    # Fewer programs: the interpreter runs them one by one.
    monkeypatch.setattr(self_check, "_CONTEXT", 70)
    monkeypatch.setattr(self_check, "_PROMPT_ROWS", 5)
    layers = [LayerShape(2, 8, 8)]
    self_check.check(layers, Config(), 4, torch.float32, CPU)
    attend = block_attention.attend

    def wrong(*arguments: Any) -> torch.Tensor:
        return attend(*arguments) + (arguments[-1] == 4) * 0.01

    monkeypatch.setattr(block_attention, "attend", wrong)
    with pytest.raises(ValueError, match=r"off by 0\.01.*4 splits"):
        self_check.check(layers, Config(), 4, torch.float32, CPU)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    # The check runs many programs, and the interpreter runs them one by one.
    monkeypatch.setattr(self_check, "check", lambda *_: None)
    return lambda family: save_model(family, tmp_path / family)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_graph_runner_reads_blocks_in_place_and_generates_the_same(
    family: str, tiny: Callable[[str], Path]
) -> None:
    folder = tiny(family)
    tested = make_engine(folder, runner="graphs", max_sequences=4)
    reference = make_engine(folder, runner="reference", max_sequences=4)
    assert isinstance(tested.runner, GraphRunner)
    assert tested.runner.in_place
    outputs = []
    for engine in (tested, reference):
        prompts = ([5, 6, 7], [8] * 30, [9, 10])
        outputs.append([submit(engine, prompt, max_tokens=5, ignore_eos=True) for prompt in prompts])
        run(engine)
    assert [output.token_ids for output in outputs[0]] == [output.token_ids for output in outputs[1]]
    # One shape for each number of rows, whatever the contexts.
    assert len({rows for rows, _ in tested.runner.graphs.recordings}) == len(tested.runner.graphs.recordings)
    assert {length for _, length in tested.runner.graphs.recordings} == {256}


def test_kernels_that_fail_leave_gathered_attention(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(self_check, "check", fails)
    engine = make_engine(tiny("llama"), runner="graphs")
    assert not engine.runner.in_place  # type: ignore[attr-defined]
    assert "the kernels fail here: no such instruction" in caplog.text
