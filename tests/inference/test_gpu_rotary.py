"""The GPU's rotation of queries and keys as they are written, interpreted on the CPU, gives that of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.runners import reference
from engine.runners.gpu import fused_layers, rotary
from transformers import AutoModelForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from .harness import save_model
from .triton_interpreter import interpreter, needs_triton  # noqa: F401 (a fixture)

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "rotary_width"), [(4, 2, 8, 8, 8), (3, 1, 24, 40, 12)]
)
def test_queries_are_rotated_and_keys_and_values_written(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, value_width: int, rotary_width: int
) -> None:
    torch.manual_seed(0)
    tokens = 3
    # As Hugging Face's code has them: (1, tokens, heads, width), transposed.
    query, key, value = (
        torch.randn(1, tokens, count, size).to(dtype).transpose(1, 2)
        for count, size in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    )
    angles = torch.rand(1, tokens, rotary_width // 2).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cos, sin)
    keys, values = torch.zeros(9, kv_heads, width, dtype=dtype), torch.zeros(9, kv_heads, value_width, dtype=dtype)
    slots = torch.tensor([7, 2, 5])
    rotated = rotary.rotate_and_write(query[0], key[0], value[0], (cos, sin), keys, values, slots)
    # Products and sums are rounded as torch rounds them. (The interpreter cuts off bfloat16 instead of rounding.)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(rotated, expected_query[0], **tolerance)
    torch.testing.assert_close(keys[slots], expected_key[0].transpose(0, 1), **tolerance)
    assert torch.equal(values[slots], value[0].transpose(0, 1))
    assert keys.count_nonzero() == keys[slots].count_nonzero()


@pytest.fixture
def without_fusions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow, and the other kernels have tests of their own."""
    monkeypatch.setattr(fused_layers, "fuse", lambda _: 0)


def _prepared(family: str, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(save_model(family, folder / family)).eval()
    with torch.inference_mode():
        reference.prepare(model, folder, fuses=True)
    return model


@pytest.mark.usefixtures("without_fusions")
@pytest.mark.parametrize(
    ("family", "count"),
    # Phi rotates a part of the numbers and joins them afterwards. GPT-2 has no rotations.
    [("qwen3", 2), ("gpt_neox", 2), ("phi", 0), ("gpt2", 0)],
)
def test_the_rotations_that_the_kernel_computes_are_deferred(family: str, count: int, tmp_path: Path) -> None:
    model = _prepared(family, tmp_path)
    assert rotary.settle(model, defers=True) == count
    layers = [module for module in model.modules() if rotary.of(module)]
    assert len(layers) == count
    assert [module for module in model.modules() if "forward" in vars(module)] == layers
    # The class of the layers rotates as before, for other models of the process.
    other = AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
    assert other(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.usefixtures("without_fusions")
def test_rotations_stay_where_attention_gathers_its_blocks_or_the_kernel_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert rotary.settle(_prepared("llama", tmp_path), defers=False) == 0
    rotate = rotary.rotate_and_write
    monkeypatch.setattr(rotary, "rotate_and_write", lambda *arguments: rotate(*arguments) + 0.01)
    assert rotary.settle(_prepared("llama", tmp_path), defers=True) == 0

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(rotary, "rotate_and_write", fails)
    model = _prepared("llama", tmp_path)
    assert rotary.settle(model, defers=True) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert "the kernel fails here: no compiler" in caplog.text


def test_a_deferred_rotation_that_does_not_reach_the_attention_is_noticed() -> None:
    rotation = rotary.DeferredRotation(apply_rotary_pos_emb)
    rotation.defers = True
    query, key = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    returned = rotation(query, key, torch.rand(1, 3, 4), torch.rand(1, 3, 4))
    with pytest.raises(AssertionError):
        rotation.take(returned[0] * 2, returned[1])
