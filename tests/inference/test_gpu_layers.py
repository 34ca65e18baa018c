"""The GPU's fused layers give the numbers of the layers that they replace, and only those are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.runners.gpu import fused_layers
from engine.runners.gpu.fused_layers import FusedMLP, FusedRMSNorm
from torch import nn
from transformers import AutoModelForCausalLM

from .harness import save_model
from .triton_interpreter import interpreter, needs_triton  # noqa: F401 (a fixture)

pytestmark = needs_triton


def _model(family: str, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_model(family, folder)).eval()


@pytest.mark.parametrize(
    ("family", "norms", "mlps"),
    # Norms of a layer: 2; 4 with those of query and key; 4 around attention and MLP. One more at the end.
    [("llama", 5, 2), ("qwen3", 9, 2), ("gemma2", 9, 0), ("olmo2", 9, 2), ("gpt_neox", 0, 0)],
)
def test_a_family_computes_the_same_with_fused_layers(family: str, norms: int, mlps: int, tmp_path: Path) -> None:
    model = _model(family, tmp_path)
    for name, weight in model.named_parameters():
        # At first they are all 1, or 0.
        if "norm" in name and name.endswith("weight"):
            weight.data += torch.linspace(-0.3, 0.4, weight.numel())
    ids = torch.tensor([[5, 6, 7, 90]])
    with torch.inference_mode():
        expected = model(ids).logits
        count = fused_layers.fuse(model)
        actual = model(ids).logits
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(FusedRMSNorm), kinds.count(FusedMLP), count) == (norms, mlps, norms + mlps)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


class MeanlessRMSNorm(nn.Module):
    """Named like an RMSNorm, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(12)), 1e-6

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = numbers - numbers.mean(-1, keepdim=True)
        return numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def test_a_layer_of_other_numbers_stays() -> None:
    model = nn.Sequential(MeanlessRMSNorm())
    assert fused_layers.fuse(model) == 0
    assert type(model[0]) is MeanlessRMSNorm


def test_a_kernel_that_fails_leaves_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(FusedRMSNorm, "forward", fails)
    model = _model("gemma2", tmp_path)
    assert fused_layers.fuse(model) == 0
    assert "a kernel fails here: no compiler" in caplog.text
    assert FusedRMSNorm not in map(type, model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_do_not_lie_together_and_odd_widths(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(3, 4, 2, 19).to(dtype).transpose(1, 2)
    weight = nn.Parameter(torch.rand(19).to(dtype), requires_grad=False)
    norm = FusedRMSNorm(weight, 1e-5, adds_one=False)(numbers)
    floats = numbers.float()
    expected = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(norm.float(), expected, **tolerance)
    both = torch.randn(2, 3, 2 * 1030).to(dtype)
    gate, up = both.chunk(2, -1)
    result = fused_layers.silu_multiply(both)
    torch.testing.assert_close(result, nn.functional.silu(gate) * up, **tolerance)
