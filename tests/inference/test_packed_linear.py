"""Packed linear layers against matmuls in float64, also as on a processor without oneDNN's bfloat16 matmul."""

from __future__ import annotations

import pytest
import torch
from engine.runners.packed_linear import PackedLinear

HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
OUTPUTS, INPUTS = 96, 160


@pytest.fixture(params=["this", "without bfloat16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "this":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("count", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_layer_computes_the_matmul(processor: str, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(OUTPUTS, INPUTS).to(dtype), torch.randn(OUTPUTS).to(dtype)
    rows = torch.randn(1, count, INPUTS).to(dtype)
    layer = PackedLinear(weight, bias)
    output = layer(rows)
    assert output.dtype == dtype
    assert output.shape == (1, count, OUTPUTS)
    expected = rows.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(output.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@torch.inference_mode()
def test_weights_become_float32_only_without_a_bfloat16_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.randn(1, 3, INPUTS).bfloat16(), torch.randn(OUTPUTS, INPUTS).bfloat16()
    native = PackedLinear(weight, None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    converted = PackedLinear(weight, None)
    assert (native._dtype == torch.bfloat16) == HAS_BFLOAT16
    assert converted._dtype == torch.float32
    # Both accumulate in float32 and round once.
    torch.testing.assert_close(native(rows), converted(rows), rtol=8e-3, atol=1e-2)
