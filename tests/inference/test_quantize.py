"""Quantization to groups: each code is the nearest, the scale is better than plain ones, and float16 holds it."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from engine.runners.native.quantize import quantize_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonlm.contract import CheckpointError

_RANGES = {4: (-8, 7), 8: (-127, 127)}


def squared_error(weight: torch.Tensor, other: torch.Tensor) -> float:
    return float((weight - other).square().sum())


@pytest.mark.parametrize("bits", [4, 8])
@settings(deadline=None, max_examples=40)
@given(arrays.arrays(np.float32, (3, 64), elements=st.floats(-1e3, 1e3, width=32)))
def test_each_code_is_the_nearest_of_its_range(bits: int, numbers: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    weight = torch.from_numpy(numbers)
    quantized = quantize_groups(weight, bits)
    assert quantized.codes.shape == (3, 64)
    assert quantized.codes.dtype == torch.int8
    assert quantized.scales.shape == (3, 2)
    assert quantized.group == 32
    low, high = _RANGES[bits]
    steps = quantized.scales.double().repeat_interleave(32, 1)
    levels = torch.arange(low, high + 1) * steps[..., None]
    nearest = (levels - weight[..., None]).abs().amin(-1)
    # Scales are subject to rounding where a number lies between two codes.
    assert ((quantized.codes * steps - weight).abs() <= nearest + 1e-6 * steps.abs() * high).all()
    # With a scale of 0 all is 0: only where that is what the weights are.
    assert (quantized.scales != 0).logical_or(weight.view(3, 2, 32).abs().amax(2) < 1e-35).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_less_than_with_plain_scales(bits: int) -> None:
    weight = torch.randn(50, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    groups, high = weight.view(50, -1, 32), _RANGES[bits][1]
    steps = groups.abs().amax(2, keepdim=True) / high
    plain = ((groups / steps).round() * steps).view_as(weight)
    best = quantize_groups(weight, bits).dequantized()
    assert squared_error(weight, best) < squared_error(weight, plain) * (0.75 if bits == 4 else 1)


@pytest.mark.parametrize(
    ("dtype", "scale_type", "rows", "group"),
    [(torch.bfloat16, torch.bfloat16, 7, 32), (torch.float32, torch.float16, 300, 64)],
)
def test_rows_are_independent_and_a_smaller_type_holds_the_scales(
    dtype: torch.dtype, scale_type: torch.dtype, rows: int, group: int
) -> None:
    weight = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantized = quantize_groups(weight, 4, group, scale_type)
    assert quantized.group == group
    assert torch.equal(quantized.scales.to(scale_type).float(), quantized.scales)
    alone = quantize_groups(weight[3:4], 4, group, scale_type)
    assert torch.equal(alone.codes, quantized.part(slice(3, 4)).codes)
    assert torch.equal(alone.scales, quantized.part(slice(3, 4)).scales)


def test_what_4_bits_can_hold_is_kept() -> None:
    codes = torch.randint(-8, 8, (6, 96), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    codes[:, ::32] = -8
    scales = torch.tensor([0.5, -0.125, 3.0]).expand(6, 3)
    weight = codes * scales.repeat_interleave(32, 1)
    quantized = quantize_groups(weight, 4)
    assert torch.equal(quantized.dequantized(), weight)
    assert torch.equal(quantized.codes, codes)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = number
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_groups(weight, 8)
