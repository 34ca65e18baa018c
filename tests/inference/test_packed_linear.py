"""Packed linear layers against plain products, also as on a processor for which oneDNN has no products of bfloat16."""

from __future__ import annotations

import pytest
import torch
from engine.runners.packed_linear import PackedLinear

HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
OUTPUTS, INPUTS = 96, 160


@pytest.fixture(params=["here", "without bfloat16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "here":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("count", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_it_is_the_product(processor: str, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(OUTPUTS, INPUTS).to(dtype), torch.randn(OUTPUTS).to(dtype)
    rows = torch.randn(1, count, INPUTS).to(dtype)
    layer = PackedLinear(weight, bias)
    found = layer(rows)
    assert found.dtype == dtype
    assert found.shape == (1, count, OUTPUTS)
    expected = rows.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@torch.inference_mode()
def test_weights_are_widened_only_where_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.randn(1, 3, INPUTS).bfloat16(), torch.randn(OUTPUTS, INPUTS).bfloat16()
    here = PackedLinear(weight, None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    widened = PackedLinear(weight, None)
    assert (here._dtype == torch.bfloat16) == HAS_BFLOAT16
    assert widened._dtype == torch.float32
    # Both sum in float32 and round once.
    torch.testing.assert_close(here(rows), widened(rows), rtol=8e-3, atol=1e-2)
