"""Quantized matrices in the kernels' layout (kernels/grouped_form.hpp): blocks of 16 outputs, each with its own form.

This module knows the kernels' layout, not files, nor what a matrix is for.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch
from torch.nn import functional

from .large_pages import LargePages
from .quantized import BLOCK_OUTPUTS, Quantized
from .structures import INT, POINTER, GroupedBlock, GroupedForm, GroupedNumbers, GroupedSource

# The groups and the bits that the kernels multiply; a larger group's scale is repeated.
GROUPS, BITS = (16, 32), (2, 3, 4, 5, 6, 8)
# Scales become float16 after division by a power of two for each output, so that the largest is at most this.
_LARGEST_SCALE = 2.0**14


@dataclass(frozen=True)
class PackedGroups:
    """`data` holds the blocks, of block_bytes each; `factors` multiply the sums of outputs."""

    data: torch.Tensor
    block_bytes: int
    form: GroupedForm
    factors: torch.Tensor

    def blocks(self) -> list[GroupedBlock]:
        first, form = self.data.data_ptr(), ctypes.addressof(self.form)
        return [GroupedBlock(first + n, form) for n in range(0, len(self.data), self.block_bytes)]


def is_supported(matrix: Quantized) -> bool:
    """Whether the kernels multiply it without loss."""
    # Of six bits the kernels sum codes of up to 32 in magnitude.
    fits = matrix.bits != 6 or matrix.lowest_code == -32
    return fits and matrix.bits in BITS and any(matrix.group % group == 0 for group in GROUPS)


def pack_groups(matrix: Quantized, library: ctypes.CDLL, pages: LargePages | None = None) -> PackedGroups:
    """The result lies in `pages`."""
    outputs, inputs = matrix.shape
    group = next(group for group in reversed(GROUPS) if matrix.group % group == 0)
    factors = _output_factors(matrix)
    numbers, pairs = _numbers(matrix, group, factors)
    codes, stored = matrix.codes, matrix.stored_as
    codes = codes.contiguous() if stored else (codes - matrix.lowest_code).view(torch.uint8).contiguous()
    form = _form_of(matrix, group, pairs=pairs)
    library.size_grouped_form.restype = ctypes.c_int64
    library.size_grouped_form.argtypes = [POINTER, INT]
    library.pack_grouped_weights.argtypes = [POINTER, POINTER, INT, POINTER]
    block_bytes = library.size_grouped_form(ctypes.byref(form), inputs)
    data = (pages or LargePages()).zeros(-(-outputs // BLOCK_OUTPUTS) * block_bytes)
    source = GroupedSource(
        codes.data_ptr(), codes.shape[1], *map(_placed, numbers), outputs, inputs, stored.number if stored else 0
    )
    library.pack_grouped_weights(
        ctypes.byref(form), ctypes.byref(source), len(os.sched_getaffinity(0)), data.data_ptr()
    )
    return PackedGroups(data, block_bytes, form, functional.pad(factors, (0, -outputs % BLOCK_OUTPUTS)))


def _numbers(matrix: Quantized, group: int, factors: torch.Tensor) -> tuple[list[torch.Tensor | None], bool]:
    """Scales, minima and their steps as grouped_pack.hpp reads them; and whether scales and minima are pairs."""

    def halves(part: torch.Tensor | None) -> torch.Tensor | None:
        return part if part is None or part.dtype == torch.float16 else (part / factors[:, None]).half()

    scales, minima = (_repeated(part, matrix.group // group) for part in (matrix.scales, matrix.minima))
    if matrix.scale_steps is None:
        return [halves(scales), halves(minima), None, None], False
    steps = map(halves, (matrix.scale_steps, matrix.minimum_steps))
    pairs = _pairs(scales, minima)
    return [*((scales, minima) if pairs is None else (pairs, None)), *steps], pairs is not None


def _placed(numbers: torch.Tensor | None) -> GroupedNumbers:
    if numbers is None:
        return GroupedNumbers()
    return GroupedNumbers(numbers.data_ptr(), *(stride * numbers.itemsize for stride in numbers.stride()))


def _form_of(matrix: Quantized, group: int, *, pairs: bool) -> GroupedForm:
    table = [0] * BLOCK_OUTPUTS if matrix.table is None else matrix.table
    return GroupedForm(
        bits=matrix.bits, group=group, two_level=matrix.scale_steps is not None, has_minima=matrix.minima is not None,
        pairs=pairs, zero=-matrix.lowest_code if matrix.table is None else 0,
        has_table=matrix.table is not None, table=(ctypes.c_int8 * 16)(*table),
    )  # fmt: skip


def _pairs(scales: torch.Tensor | None, minima: torch.Tensor | None) -> torch.Tensor | None:
    """Whole scales and minima of 4 bits in one byte each; None if they do not fit."""

    def fits(numbers: torch.Tensor) -> bool:
        # numpy finds the extremes of bytes several times as fast as torch.
        return bool(numbers.numpy().max() <= 15 and numbers.numpy().min() >= 0)

    return None if scales is None or minima is None or not fits(scales) or not fits(minima) else scales | minima << 4


def _output_factors(matrix: Quantized) -> torch.Tensor:
    """A power of two for each output, by which its scales and minima fit float16; 1 if they are float16."""
    two_level = matrix.scale_steps is not None
    pair = [matrix.scale_steps, matrix.minimum_steps] if two_level else [matrix.scales, matrix.minima]
    numbers = [part for part in pair if part is not None]
    if all(part.dtype == torch.float16 for part in numbers):
        return torch.ones(matrix.shape[0])
    bounds = [torch.maximum(part.amax(dim=1), -part.amin(dim=1)) for part in numbers]
    largest = torch.stack(bounds).amax(dim=0)
    exponents = torch.frexp(largest / _LARGEST_SCALE).exponent
    return torch.ldexp(torch.ones(len(largest)), exponents).where(largest > 0, torch.ones(()))


def _repeated(numbers: torch.Tensor | None, repeats: int) -> torch.Tensor | None:
    return numbers if numbers is None or repeats == 1 else numbers.repeat_interleave(repeats, dim=1)
