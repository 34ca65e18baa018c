"""A LoRA adapter in the layout of kernels/low_rank.hpp, with the order and the padding of the base's weights.

Numbers are bfloat16 where the rows are, or where that loses nothing. This module knows matrices and their places, not
files, requests or arithmetic.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from tritonlm.contract import CheckpointError

from ...adapters.lora import LoraAdapter, LowRank
from . import structures
from .large_pages import own_memory
from .padding import padded, take
from .placement import Part, Placement
from .quantized import BLOCK_OUTPUTS

# As in low_rank.hpp: ranks of a block of A, and inputs that are consecutive.
_BLOCK_RANKS, _LINE_INPUTS = 8, 32
# Bytes of a cache line: matrices begin at one.
_ALIGNMENT = 64
# A step reads the same matrix of many adapters. In large pages they would all lie at the same lines of a cache, which
# holds eight of them: so adapters begin at lines that are spread over those that a second-level cache distinguishes.
_CACHE_LINES, _GOLDEN_RATIO = 2048, (math.sqrt(5) - 1) / 2
_numbers = itertools.count()


class NativeAdapter:
    """An adapter's memory, and the structures that the kernels read."""

    def __init__(self, packed: Mapping[int, _Packed], operations: int, dtype: torch.dtype) -> None:
        """`packed` are the matrices of some of the program's operations."""
        tensors = [tensor for each in packed.values() for tensor in (each.a, *each.b)]
        size = sum(map(_aligned_length, tensors)) * dtype.itemsize
        self._memory = own_memory(size, _next_head()).view(dtype)
        addresses = self._place(tensors)
        # Part by part, as the tensors are.
        self._parts: list[ctypes.Array[structures.LowRankPart]] = []
        self._operations = (structures.LowRank * operations)()
        for number, each in packed.items():
            self._operations[number] = self._low_rank(each, addresses)
        most = max(each.rank for each in packed.values())
        self._adapter = structures.Adapter(ctypes.addressof(self._operations), most, dtype == torch.bfloat16)

    @property
    def nbytes(self) -> int:
        structures_bytes = ctypes.sizeof(self._operations) + sum(map(ctypes.sizeof, self._parts))
        return int(self._memory.nbytes) + structures_bytes

    @property
    def address(self) -> int:
        return ctypes.addressof(self._adapter)

    def _place(self, tensors: Sequence[torch.Tensor]) -> Iterator[int]:
        """Copies them into the memory, and yields where each begins."""
        begin = 0
        for tensor in tensors:
            place = self._memory[begin : begin + tensor.numel()]
            place.copy_(tensor)
            begin += _aligned_length(tensor)
            yield place.data_ptr()

    def _low_rank(self, packed: _Packed, addresses: Iterator[int]) -> structures.LowRank:
        a, parts = next(addresses), packed.placement.parts
        matrices, itemsize = [next(addresses) for _ in packed.b], packed.a.element_size()
        array = (structures.LowRankPart * len(parts))(
            *(
                structures.LowRankPart(
                    matrices[place.matrix] + place.offset * itemsize, part.size // BLOCK_OUTPUTS, place.first_rank,
                    place.rank, place.stride * itemsize,
                )
                for part, place in zip(parts, packed.places, strict=True)
            )
        )  # fmt: skip
        self._parts.append(array)
        return structures.LowRank(
            a, ctypes.addressof(array), packed.a.nbytes, packed.rank, len(parts), packed.placement.interleaved
        )


@dataclass(frozen=True)
class _Place:
    """Where B of a part lies: the first block in one of the matrices, and the distance of blocks, in numbers."""

    first_rank: int
    rank: int
    matrix: int
    offset: int
    stride: int


@dataclass(frozen=True)
class _Packed:
    """The matrices of one operation, flat."""

    placement: Placement
    a: torch.Tensor
    b: list[torch.Tensor]
    # One for each part.
    places: list[_Place]
    # Of all layers.
    rank: int

    @classmethod
    def of(cls, placement: Placement, layers: Mapping[str, LowRank], dtype: torch.dtype) -> _Packed:
        ranks: dict[str, tuple[int, int]] = {}
        rank = 0
        for name in placement.layers:
            ranks[name] = (rank, layers[name].rank if name in layers else 0)
            rank += ranks[name][1]
        a = _packed_a([layers[name].a for name in placement.layers if name in layers], placement.inputs)
        b = [_packed_b(layers.get(part.layer), part, dtype) for part in placement.parts]
        # Numbers of a block, for each part.
        sizes = [blocks.shape[1] for blocks in b]
        if placement.interleaved:
            # In the order in which the outputs are computed.
            b, strides, offsets = [torch.cat(b, dim=1)], [sum(sizes)] * len(sizes), [0, *sizes[:-1]]
            matrices = [0] * len(sizes)
        else:
            strides, offsets, matrices = sizes, [0] * len(sizes), list(range(len(sizes)))
        places = [
            _Place(*ranks[part.layer], *numbers)
            for part, *numbers in zip(placement.parts, matrices, offsets, strides, strict=True)
        ]
        return cls(placement, a.to(dtype), [blocks.flatten() for blocks in b], places, rank)


def pack_adapter(
    adapter: LoraAdapter, placements: Mapping[int, Placement], prefix: str, operations: int, dtype: torch.dtype
) -> NativeAdapter:
    """`placements` are those of a program of this many operations; names of its tensors begin with `prefix`."""
    _check(adapter, placements, prefix)
    layers = {name.removeprefix(prefix): layer for name, layer in adapter.layers.items()}
    if all(_is_bf16(matrix) for layer in layers.values() for matrix in (layer.a, layer.b)):
        dtype = torch.bfloat16
    changed = {
        number: placement for number, placement in placements.items() if not layers.keys().isdisjoint(placement.layers)
    }
    packed = {number: _Packed.of(placement, layers, dtype) for number, placement in changed.items()}
    return NativeAdapter(packed, operations, dtype)


def _check(adapter: LoraAdapter, placements: Mapping[int, Placement], prefix: str) -> None:
    reason = f"adapter {adapter.name!r} cannot be applied"
    if not adapter.layers:
        raise CheckpointError(f"{reason}: it changes no layer")
    shapes = {
        part.layer: (placement.layer_inputs, part.layer_outputs)
        for placement in placements.values()
        for part in placement.parts
    }
    for name, matrices in adapter.layers.items():
        layer = name.removeprefix(prefix)
        if layer not in shapes:
            raise CheckpointError(
                f"{reason}: it changes {name}, and the native runner applies adapters to the linear layers of "
                "attention and of MLPs without experts; train it without that layer, or set the runner to reference"
            )
        if (found := (matrices.inputs, matrices.outputs)) != shapes[layer]:
            raise CheckpointError(
                f"{reason}: its matrices for {name} are those of a layer of {found[0]} inputs and {found[1]} "
                f"outputs, but the LM's has {shapes[layer][0]} and {shapes[layer][1]}; use an adapter of this LM"
            )


def _is_bf16(matrix: torch.Tensor) -> bool:
    return matrix.dtype == torch.bfloat16 or torch.equal(matrix.bfloat16().float(), matrix.float())


def _packed_a(matrices: Sequence[torch.Tensor], order: Sequence[int]) -> torch.Tensor:
    """(ranks, inputs) of each layer, one below the other → blocks of 8 ranks, each [inputs / 32][ranks][32]."""
    a = torch.cat([take(matrix.float().t(), order).t() for matrix in matrices])
    lines = functional.pad(a, (0, padded(a.shape[1]) - a.shape[1])).view(len(a), -1, _LINE_INPUTS)
    blocks = (lines[first : first + _BLOCK_RANKS] for first in range(0, len(lines), _BLOCK_RANKS))
    return torch.cat([block.transpose(0, 1).flatten() for block in blocks])


def _packed_b(layer: LowRank | None, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, rank) → for each block of 16 outputs [rank / s][16][s] and a last rank of its own."""
    if layer is None:
        return torch.empty(part.size // BLOCK_OUTPUTS, 0, dtype=dtype)
    b = take(layer.b.float(), part.outputs)
    blocks = functional.pad(b, (0, 0, 0, part.size - len(b))).view(-1, BLOCK_OUTPUTS, layer.rank)
    step = 2 if dtype == torch.bfloat16 else 1
    whole = layer.rank // step * step
    steps = blocks[:, :, :whole].reshape(*blocks.shape[:2], whole // step, step).transpose(1, 2).flatten(1)
    return torch.cat((steps, blocks[:, :, whole:].flatten(1)), dim=1).to(dtype)


def _next_head() -> int:
    """The bytes of an adapter before its first large page."""
    return int(next(_numbers) * _GOLDEN_RATIO % 1 * _CACHE_LINES) * _ALIGNMENT


def _aligned_length(tensor: torch.Tensor) -> int:
    """The numbers that its place in the memory has."""
    line = _ALIGNMENT // tensor.dtype.itemsize
    return tensor.numel() + -tensor.numel() % line
