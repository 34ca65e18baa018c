"""Quantizes a matrix to integers with a scale for each group of inputs: round to nearest, at the best of some scales.

    weight ≈ scale * code, the code from -8 to 7 (4 bits) or -127 to 127 (8 bits)

For each candidate of a group's scale the codes are fixed by rounding, and then the scale of least squared error is
sum(weight * code) / sum(code * code). Scales have the bits of a smaller number type's mantissa, so that it holds them
exactly. This module knows neither files nor the kernels' layout.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract import CheckpointError

from .quantized import Quantized

Floats = npt.NDArray[np.float32]

# Numbers at a time: with their codes and products they fit into a core's second-level cache.
_SLICE = 2**16
_MAX_THREADS = 8
# Where a group's largest number lies among the codes, before rounding: the more it is clipped, the finer is the rest.
# A negative scale lets it be the code -8, which has no positive counterpart.
_TARGETS = {4: (-7.0, -7.25, -7.5, -7.75, -8.0, -8.25, -8.5), 8: (126.5, 126.75, 127.0, 127.25, 127.5)}
_RANGES = {4: (-8, 7), 8: (-127, 127)}
# Weights of smaller magnitude count as zeros.
_LEAST = 1e-35
# 2 to the bits of the mantissa, the implicit one included. Of float32 no more than float16 has: codes need no more.
_MANTISSAS = {torch.float32: 2**11, torch.float16: 2**11, torch.bfloat16: 2**8}


def quantize_groups(
    weight: torch.Tensor, bits: int, group: int = 32, scale_type: torch.dtype = torch.float32
) -> Quantized:
    """Of (outputs, inputs); the inputs are a multiple of `group`. Scales have the precision of `scale_type`.

    Raises CheckpointError for numbers that are not finite.
    """
    outputs, inputs = weight.shape
    assert inputs % group == 0, f"{inputs} inputs are not groups of {group}"
    codes = torch.empty(outputs, inputs, dtype=torch.int8)
    scales = torch.empty(outputs, inputs // group)
    rows = max(1, _SLICE // inputs)

    def fill(first: int) -> None:
        part = slice(first, first + rows)
        # Numbers of a group lie one below the other, so that sums run along whole vectors.
        columns = np.ascontiguousarray(weight[part].float().reshape(-1, group).numpy().T)
        best = _best_scales(columns, bits, np.float32(_MANTISSAS[scale_type]))
        rounded = _codes(columns, _inverse(best), bits, np.empty_like(columns))
        codes[part] = torch.from_numpy(rounded.T.astype(np.int8, order="C")).view(-1, inputs)
        scales[part] = torch.from_numpy(best).view(-1, inputs // group)

    # numpy computes on the thread that calls it. torch's own threads wait for each other at each operation, which takes
    # long where other processes are busy.
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))), "tritonlm-quantize") as threads:
        # Waits for all, and raises what one raised.
        list(threads.map(fill, range(0, outputs, rows)))
    return Quantized(codes, scales, None, bits)


def _best_scales(columns: Floats, bits: int, mantissa: np.float32) -> Floats:
    """The scale of each column. What it saves of the squared error is sum(weight * code)² / sum(code²)."""
    low, high = columns.min(axis=0), columns.max(axis=0)
    extreme = np.where(-low > high, low, high)
    if not np.isfinite(extreme).all():
        raise CheckpointError("the weights have numbers that are not finite, which cannot be quantized")
    # From -1 to 1: no square is too small for a float.
    columns = columns * _inverse(extreme)
    best, best_saved = np.zeros_like(extreme), np.zeros_like(extreme)
    codes, products = np.empty_like(columns), np.empty_like(columns)
    for target in _TARGETS[bits]:
        _codes(columns, np.float32(target), bits, codes)
        dots = np.multiply(columns, codes, out=products).sum(axis=0)
        # No codes but zeros: then the other sum is 0 as well.
        squares = np.multiply(codes, codes, out=products).sum(axis=0).clip(min=1)
        scales = dots / squares
        saved = dots * scales
        better = saved > best_saved
        np.copyto(best, scales, where=better)
        np.copyto(best_saved, saved, where=better)
    # Scales of smaller numbers have no exact codes: those numbers are zeros.
    best[np.abs(extreme) < _LEAST] = 0
    mantissas, exponents = np.frexp(best * extreme)
    rounded: Floats = np.ldexp(np.rint(mantissas * mantissa) / mantissa, exponents)
    return rounded


def _codes(columns: Floats, inverse_scales: Floats | np.float32, bits: int, out: Floats) -> Floats:
    low, high = _RANGES[bits]
    np.multiply(columns, inverse_scales, out=out)
    return np.clip(np.rint(out, out=out), low, high, out=out)


def _inverse(numbers: Floats) -> Floats:
    """1 / number, or 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / numbers
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
