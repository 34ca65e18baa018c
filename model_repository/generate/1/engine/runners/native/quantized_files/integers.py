"""Integers of 4 or 8 bits with scales and zero points for groups of inputs: AWQ, GPTQ, compressed-tensors.

    weight = (code - zero) * scale

The formats differ in the order of their integers. In int32, element k of 32 / bits lies at bit k * bits:

    AWQ        along the outputs, those of each 8 in the order 0 2 4 6 1 3 5 7
    GPTQ       codes along the inputs, zeros along the outputs; the first version stores zeros less 1
    PACKED     codes along the inputs, zeros along the outputs, (outputs, inputs)
    SCALED     int8 (outputs, inputs)

`Integers` is what they have in common. This module reads no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tritonlm.contract import CheckpointError
from tritonlm.contract.quantization import Encoding, Layout

from ..quantized import Quantized

# A stored tensor of a layout, by its role.
Parts = Callable[[str], torch.Tensor]
# Which of each 8 outputs element k is.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The kernels need groups of whole vectors.
_GROUP_MULTIPLE = 16


@dataclass(frozen=True)
class Integers:
    """(outputs, inputs), signed: 0 is in the middle of the codes that are possible."""

    codes: torch.Tensor  # int8
    scales: torch.Tensor  # (outputs, groups), in the number type of the file
    zeros: torch.Tensor | None  # int8 (outputs, groups); None: 0
    index: torch.Tensor | None  # The group of each input; None: groups are consecutive inputs
    bits: int

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Computed in the number type of the scales, as the formats' own code does."""
        outputs, groups = self.scales.shape
        scales, zeros = self.scales, self.zeros
        if self.index is not None:
            scales, zeros = _columns(scales, self.index), None if zeros is None else _columns(zeros, self.index)
            groups = scales.shape[1]
        values = self.codes.to(scales.dtype).view(outputs, groups, -1)
        if zeros is not None:
            values -= zeros[..., None]
        values *= scales[..., None]
        return values.view(outputs, -1).to(dtype)

    def quantized(self) -> Quantized | None:
        """None where the inputs of a group are not consecutive, or not whole vectors."""
        group = self.codes.shape[1] // self.scales.shape[1]
        if self.index is not None or group % _GROUP_MULTIPLE:
            return None
        scales = self.scales.float().contiguous()
        minima = None if self.zeros is None else scales * -self.zeros.float()
        return Quantized(self.codes, scales, minima, self.bits)


def _columns(numbers: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """numbers[:, index]: whole rows of the transposed are much faster to take."""
    return numbers.t().contiguous().index_select(0, index).t().contiguous()


def read_integers(layout: Layout, part: Parts) -> Integers:
    readers = {Encoding.AWQ: _awq, Encoding.GPTQ: _gptq, Encoding.PACKED: _packed, Encoding.SCALED: _int8}
    return readers[layout.encoding](layout, part)


def _awq(layout: Layout, part: Parts) -> Integers:
    codes, zeros = (_unpacked_outputs(part(role), layout.bits, _AWQ_ORDER) for role in ("codes", "zeros"))
    return _signed(layout, codes, zeros, part("scales").t(), None)


def _gptq(layout: Layout, part: Parts) -> Integers:
    codes = _unpacked(part("codes").t(), layout.bits)
    zeros = _unpacked_outputs(part("zeros"), layout.bits) + layout.zero_offset & 2**layout.bits - 1
    return _signed(layout, codes, zeros, part("scales").t(), _index(layout, part))


def _packed(layout: Layout, part: Parts) -> Integers:
    codes = _unpacked(part("codes"), layout.bits)
    if "shape" in layout.parts and part("shape").tolist() != list(codes.shape):
        raise CheckpointError(
            f"{layout.parts['shape']} says {part('shape').tolist()}, but the packed numbers are {list(codes.shape)}"
        )
    zeros = None
    if "zeros" in layout.parts:
        zeros = _unpacked_outputs(part("zeros").t(), layout.bits)[: len(codes)]
    return _signed(layout, codes, zeros, part("scales"), _index(layout, part))


def _int8(layout: Layout, part: Parts) -> Integers:
    zeros = _by_output(layout, part("zeros")) if "zeros" in layout.parts else None
    return Integers(part("values"), _by_output(layout, part("scales")), _unless_zero(zeros), None, 8)


def _signed(
    layout: Layout, codes: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor, index: torch.Tensor | None
) -> Integers:
    # In eight bits, where a difference below 0 wraps: its bits are those of the signed number.
    middle = 2 ** (layout.bits - 1)
    zeros = None if zeros is None else (zeros - middle).contiguous().view(torch.int8)
    codes = (codes - middle).contiguous().view(torch.int8)
    return Integers(codes, scales.contiguous(), _unless_zero(zeros), index, layout.bits)


def _unless_zero(zeros: torch.Tensor | None) -> torch.Tensor | None:
    return zeros if zeros is not None and zeros.any() else None


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 (a, b) → uint8 (a, b * 32 / bits)."""
    whole = packed.contiguous().view(torch.uint8)
    return whole if bits == 8 else torch.stack([whole & 15, whole >> 4], -1).flatten(1)


def _unpacked_outputs(packed: torch.Tensor, bits: int, order: Sequence[int] = range(8)) -> torch.Tensor:
    """int32 (a, b) → uint8 (b * 32 / bits, a): transposed while there are few numbers to move."""
    columns = packed.t().contiguous()
    unpacked = torch.empty(len(columns), 32 // bits, len(packed), dtype=torch.uint8)
    for k in range(32 // bits):
        unpacked[:, order[k]] = columns >> k * bits & 2**bits - 1
    return unpacked.flatten(0, 1)


def _index(layout: Layout, part: Parts) -> torch.Tensor | None:
    """None where it is that of consecutive inputs; compressed-tensors writes -1 for that."""
    if "index" not in layout.parts:
        return None
    index = part("index").long()
    inputs, groups = len(index), len(index) // layout.group
    if (index == -1).any() or torch.equal(index, torch.arange(inputs) // layout.group):
        return None
    if index.min() < 0 or index.max() >= groups:
        raise CheckpointError(f"{layout.parts['index']} names groups of which there are none: there are {groups}")
    return index


def _by_output(layout: Layout, numbers: torch.Tensor) -> torch.Tensor:
    """A row for each output, where one stands for several."""
    outputs, inputs = layout.shape
    rows = numbers.view(-1, -(-inputs // layout.group)).repeat_interleave(layout.block_outputs, 0)
    return rows[:outputs].contiguous()
