"""Matrices as quantized files hold them: codes of a few bits, and a scale for each group of consecutive inputs.

This module knows neither files nor the kernels' layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from .padding import is_identity
from .rope import PADDING

# Inputs for which scales in two levels have a common step.
SUPER_GROUP = 256
# kVecSize in simd.hpp: the outputs that the kernels multiply together.
BLOCK_OUTPUTS = 16
# Twice the sixteen numbers of MXFP4 (E2M1), which makes them whole.
MXFP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class BlockType:
    """How a file holds rows of codes: in blocks of bytes, which the kernels unpack (kernels/gguf_codes.hpp)."""

    number: int
    block_inputs: int
    block_bytes: int
    # Bytes (rows, bytes of a row) → int8 codes (rows, inputs).
    unpack: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """A matrix (outputs, inputs) in groups of consecutive inputs: weight = scale * code + minimum.

    With a table, a code from 0 to 15 stands for a whole number: weight = scale * table[code].
    """

    # int8 (outputs, inputs): `lowest` to lowest + 2**bits - 1; or the bytes of each output in blocks of `stored_as`.
    codes: torch.Tensor
    # float32 or float16 (outputs, inputs / group); int8 in two levels.
    scales: torch.Tensor
    # The same; None: symmetric.
    minima: torch.Tensor | None
    bits: int
    # The lowest code; None: -(2**(bits - 1)).
    lowest: int | None = None
    # In two levels: scales and minima count steps, which are float32 or float16 (outputs, inputs / 256).
    scale_steps: torch.Tensor | None = None
    minimum_steps: torch.Tensor | None = None
    # 16 numbers from -128 to 127, of 4-bit codes.
    table: tuple[int, ...] | None = None
    stored_as: BlockType | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        stored = self.stored_as
        return rows, columns // stored.block_bytes * stored.block_inputs if stored else columns

    @property
    def group(self) -> int:
        """Inputs of a scale."""
        return self.shape[1] // self.scales.shape[1]

    def unpacked(self) -> Quantized:
        """The same with int8 codes."""
        return replace(self, codes=self.stored_as.unpack(self.codes), stored_as=None) if self.stored_as else self

    @property
    def lowest_code(self) -> int:
        return -(2 ** (self.bits - 1)) if self.lowest is None else self.lowest

    def part(self, outputs: slice) -> Quantized:
        return self._changed(lambda tensor: tensor[outputs])

    def rows(self, index: Sequence[int]) -> Quantized:
        """These outputs, and outputs of zeros where the index is PADDING."""
        if is_identity(index, len(self.codes)):
            return self
        chosen = torch.tensor(index)
        exists = chosen != PADDING
        chosen = chosen.clamp(min=0)

        def take(tensor: torch.Tensor) -> torch.Tensor:
            taken = tensor[chosen]
            if not exists.all() and tensor.dtype in (torch.float32, torch.float16):
                taken = taken * exists[:, None]
            return taken

        return self._changed(take)

    def padded(self, outputs: int, inputs: int) -> Quantized | None:
        """With zeros up to these sizes; None if these inputs are not whole groups."""
        rows, columns = outputs - self.shape[0], inputs - self.shape[1]
        if columns % self.group or (columns and self.scale_steps is not None):
            return None
        if not rows and not columns:
            return self
        matrix = self.unpacked() if columns else self
        return matrix._changed(
            lambda tensor: functional.pad(tensor, (0, columns * tensor.shape[1] // self.shape[1], 0, rows))
        )

    def dequantized(self) -> torch.Tensor:
        """In float32."""
        codes = self.unpacked().codes
        numbers = codes.float() if self.table is None else torch.tensor(self.table).float()[codes.long()]
        grouped = numbers.view(*self.scales.shape, self.group) * _in_full(self.scales, self.scale_steps)[..., None]
        if self.minima is not None:
            grouped = grouped + _in_full(self.minima, self.minimum_steps)[..., None]
        return grouped.view(self.shape)

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Quantized:
        def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self, codes=change(self.codes), scales=change(self.scales), minima=optional(self.minima),
            scale_steps=optional(self.scale_steps), minimum_steps=optional(self.minimum_steps),
        )  # fmt: skip


def _in_full(numbers: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    """Scales or minima in float32."""
    if steps is None:
        return numbers.float()
    return (numbers.float().view(*steps.shape, -1) * steps.float()[..., None]).view(numbers.shape)


@dataclass(frozen=True)
class Stack:
    """Matrices one below the other, each in its own form; or `interleaved`, 16 rows of each in turn."""

    parts: tuple[Quantized, ...]
    interleaved: bool = False

    def rows(self, index: Sequence[int]) -> Stack | None:
        """These outputs of a stack that is not interleaved, with zeros where the index is PADDING; None if 16 rows that
        the kernels multiply together are not of one matrix.
        """
        ends = list(itertools.accumulate(len(part.codes) for part in self.parts))
        # The matrix of each row: padding belongs to that of the row before it.
        number, numbers = 0, []
        for row in index:
            number = number if row == PADDING else next(n for n, end in enumerate(ends) if row < end)
            numbers.append(number)
        parts = []
        for number, run in itertools.groupby(zip(numbers, index, strict=True), key=lambda pair: pair[0]):
            part, first = self.parts[number], ends[number] - len(self.parts[number].codes)
            parts.append(part.rows([row if row == PADDING else row - first for _, row in run]))
        return Stack(tuple(parts)) if all(len(part.codes) % BLOCK_OUTPUTS == 0 for part in parts) else None

    def dequantized(self) -> torch.Tensor:
        matrices = [part.dequantized() for part in self.parts]
        return interleave_blocks(matrices) if self.interleaved else torch.cat(matrices)


def interleave_blocks(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """16 rows of the first matrix, 16 of the second, and so on."""
    return torch.stack([matrix.view(-1, BLOCK_OUTPUTS, *matrix.shape[1:]) for matrix in matrices], 1).flatten(0, 2)
