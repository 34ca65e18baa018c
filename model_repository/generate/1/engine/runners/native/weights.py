"""A checkpoint's tensors in the kernels' layout, and the memory that the kernels point to.

bfloat16 weights are packed to 12 bits each, without loss (bf16_packed.hpp), where that is faster: the kernels measure
it once. TRITONLM_NATIVE_BF16_BITS=12 or 16 decides instead; results are the same bits. This module knows files and
layouts, not which family a tensor belongs to.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from tritonlm.contract import CheckpointError
from tritonlm.contract.load_progress import LoadProgress

from ...config import AUTO, INT4, INT8
from .grouped_weights import PackedGroups, is_supported, pack_groups
from .large_pages import LargePages, Scratch
from .quantize import quantize_groups
from .quantized import BLOCK_OUTPUTS, Quantized, Stack, interleave_blocks
from .structures import INT, POINTER, GroupedBlock, WeightForm, Weights
from .tensor_source import open_tensors

# Contiguous inputs of one output, and the multiple to which int8 inputs are padded.
_CONTIGUOUS_INPUTS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
_INT8_PADDING = 64
# The bits of a bfloat16 weight in memory, 12 or 16, in place of a measurement.
BF16_BITS = "TRITONLM_NATIVE_BF16_BITS"
# Of int4: inputs with one scale, the first that divides them.
_INT4_BITS, _GROUPS = 4, (32, 16)
# One weight in this many may be an outlier, which costs 8 bytes and time.
_WEIGHTS_PER_OUTLIER = 256


class WeightPacker:
    """Reads tensors by name, with or without `prefix`, and returns pointers to their packed copies, which it holds."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        dtype: torch.dtype,
        weights: str,
        library: ctypes.CDLL,
        progress: LoadProgress,
        vocabulary_bits: int = 8,
    ) -> None:
        """`weights` is the engine's setting; with int4, the embedding has `vocabulary_bits`."""
        self.vocabulary_bits, self.prefix = vocabulary_bits, prefix
        self._folder, self._dtype, self._weights, self._library = folder, dtype, weights, library
        self._load_progress = progress
        self._held: list[Any] = []
        self._large_pages, self._scratch = LargePages(), Scratch()
        self._source = open_tensors(folder, torch.float32 if weights in (INT4, INT8) else dtype)
        self._full_names = {name.removeprefix(prefix): name for name in self._source.names()}

    def has(self, name: str) -> bool:
        return name in self._full_names

    def get(self, name: str, *shape: int, index: int | None = None) -> torch.Tensor:
        """A copy of the tensor, or of tensor[index]: overwriting the file later does not change it."""
        return self._read(self._checked_name(name, shape), index).clone()

    def _read(self, full_name: str, index: int | None) -> torch.Tensor:
        tensor = self._source.get(full_name, index)
        self._load_progress.add(tensor.nbytes)
        return tensor

    def matrix(
        self, name: str, *shape: int, index: int | None = None, transposed: bool = False
    ) -> torch.Tensor | Quantized:
        """The matrix (outputs, inputs), which may lie `transposed` in the file; quantized as there, if that is kept.

        It is not a copy: it may lie in the mapped file.
        """
        full_name = self._checked_name(name, shape)
        found = self._source.quantized(full_name, index) if self._weights in (AUTO, INT4) else None
        if found is not None and is_supported(found) and (self._weights == AUTO or found.bits <= _INT4_BITS):
            self._load_progress.add(math.prod(found.shape) * self._dtype.itemsize)
            return found
        tensor = self._read(full_name, index)
        return tensor.t() if transposed else tensor

    def get_rows(self, name: str, count: int, width: int) -> torch.Tensor:
        """The first rows of a table (rows, width), which may have more."""
        rows = self._source.shape(self._full_name(name))[0]
        return self.get(name, max(rows, count), width)[:count]

    def _checked_name(self, name: str, shape: tuple[int, ...]) -> str:
        full_name = self._full_name(name)
        if (found := self._source.shape(full_name)) != shape:
            raise CheckpointError(
                f"{self._folder} cannot be loaded: {name} has the shape {found}, config.json says {shape}"
            )
        return full_name

    def _full_name(self, name: str) -> str:
        if name not in self._full_names:
            raise CheckpointError(f"{self._folder} cannot be loaded: its weights have no {name}")
        return self._full_names[name]

    def close_files(self) -> None:
        self._source.close()
        self._scratch = Scratch()
        self._full_names.clear()

    def linear(
        self, weight: torch.Tensor | Quantized | Stack, bias: torch.Tensor | None = None, bits: int = _INT4_BITS
    ) -> Weights:
        """A linear layer; `weight` is (outputs, inputs). `bits` are those of a matrix that int4 quantizes."""
        if isinstance(weight, torch.Tensor) and self._weights == INT4:
            weight = quantize_groups(weight, bits, next(group for group in _GROUPS if weight.shape[1] % group == 0))
        if isinstance(weight, Quantized):
            weight = Stack((weight,))
        packed = self._packed(weight) if isinstance(weight, torch.Tensor) else self._packed_groups(weight)
        packed.bias = None if bias is None else self.hold(functional.pad(bias.float(), (0, packed.outputs - len(bias))))
        return packed

    def _packed(self, weight: torch.Tensor) -> Weights:
        outputs, inputs = weight.shape
        sizes = {"inputs": inputs, "outputs": outputs + -outputs % BLOCK_OUTPUTS}
        if self._weights == INT8:
            values, scales = quantize_int8(weight)
            packed_values = self._hold_in_place(pack(values, torch.int8, self._large_pages.zeros))
            return Weights(values=packed_values, scales=self.hold(scales), form=WeightForm.INT8, **sizes)
        if self._dtype == torch.bfloat16 and bf16_packing_pays(self._library):
            blocks = pack(weight, self._dtype, self._scratch.take)
            if packed := pack_bf16(blocks, self._library, self._large_pages):
                tiles = self._hold_in_place(packed.tiles)
                outliers, offsets = self.hold(packed.outliers), self.hold(packed.outlier_offsets)
                pairs = packed.exponent_pairs
                return Weights(tiles, outliers=outliers, outlier_offsets=offsets, exponent_pairs=pairs, **sizes)
        return Weights(values=self._hold_in_place(pack(weight, self._dtype, self._large_pages.zeros)), **sizes)

    def _packed_groups(self, stack: Stack) -> Weights:
        parts = [pack_groups(part, self._library, self._large_pages) for part in stack.parts]
        for part in parts:
            self.hold_structure(part)
        blocks = [part.blocks() for part in parts]
        ordered = zip(*blocks, strict=True) if stack.interleaved else blocks
        in_order = [block for each in ordered for block in each]
        array = (GroupedBlock * len(in_order))(*in_order)
        self.hold_structure(array)
        factors = [part.factors for part in parts]
        scales = interleave_blocks(factors) if stack.interleaved else torch.cat(factors)
        return Weights(
            values=ctypes.addressof(array), scales=self.hold(scales), form=WeightForm.GROUPED,
            inputs=stack.parts[0].shape[1], outputs=len(scales),
        )  # fmt: skip

    def hold(self, tensor: torch.Tensor) -> int:
        return self._hold_in_place(self._large_pages.place(tensor))

    def _hold_in_place(self, tensor: torch.Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()

    @property
    def held_bytes(self) -> int:
        """Of the weights that the kernels point to."""
        held = [part.data if isinstance(part, PackedGroups) else part for part in self._held]
        return sum(part.nbytes for part in held if isinstance(part, torch.Tensor))

    def hold_structure(self, structure: Any) -> None:
        self._held.append(structure)


def pack(weight: torch.Tensor, dtype: torch.dtype, take: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """(outputs, inputs) → blocks of 16 outputs, padded with zeros: the layouts of gemm.hpp and int8.hpp.

    One copy, in the bytes that `take` returns.
    """
    outputs, inputs = weight.shape
    more_inputs, more_outputs = -inputs % _INT8_PADDING if dtype == torch.int8 else 0, -outputs % BLOCK_OUTPUTS
    weight = weight.to(dtype)
    if more_inputs or more_outputs:
        # It copies even when there is nothing to pad.
        weight = functional.pad(weight, (0, more_inputs, 0, more_outputs))
    # The contiguous inputs of an output are four bytes in each type: moved as one number.
    fours = weight.contiguous().view(torch.int32)
    blocks = fours.view(-1, BLOCK_OUTPUTS, fours.shape[1]).transpose(1, 2)
    packed = take(blocks.nbytes).view(torch.int32).view(blocks.shape)
    packed.copy_(blocks)
    return packed.view(dtype).view(*blocks.shape, _CONTIGUOUS_INPUTS[dtype])


class PackedBf16(NamedTuple):
    """The layout of bf16_packed.hpp."""

    tiles: torch.Tensor
    outliers: torch.Tensor
    # Block n's outliers are [offsets[n], offsets[n + 1]).
    outlier_offsets: torch.Tensor
    # The exponents that have codes, as ExponentPairs of bf16_packed.hpp.
    exponent_pairs: int


def bf16_packing_pays(library: ctypes.CDLL) -> bool:
    bits = os.environ.get(BF16_BITS)
    return bits == "12" if bits else _measured_packing_pays(library)


@functools.cache
def _measured_packing_pays(library: ctypes.CDLL) -> bool:
    """Takes some milliseconds, and all of the process's processors."""
    return bool(library.bf16_packed_pays(len(os.sched_getaffinity(0))))


def pack_bf16(blocks: torch.Tensor, library: ctypes.CDLL, pages: LargePages) -> PackedBf16 | None:
    """The result of `pack`, in bfloat16, in three quarters of its bytes; None if it has too many outliers.

    Tiles lie in `pages`.
    """
    count, limit, exponent_pairs = len(blocks), blocks.numel() // _WEIGHTS_PER_OUTLIER, ctypes.c_int32()
    tiles, outliers = pages.zeros(blocks.numel() // 2 * 3), torch.empty(limit, dtype=torch.int64)
    offsets = torch.empty(count + 1, dtype=torch.int64)
    library.pack_bf16_weights.restype = ctypes.c_int64
    library.pack_bf16_weights.argtypes = [
        POINTER, INT, INT, POINTER, POINTER, POINTER, ctypes.c_int64, INT, ctypes.POINTER(ctypes.c_int32),
    ]  # fmt: skip
    outlier_count = library.pack_bf16_weights(
        blocks.data_ptr(), count, blocks.numel() // count // BLOCK_OUTPUTS, tiles.data_ptr(), outliers.data_ptr(),
        offsets.data_ptr(), limit, len(os.sched_getaffinity(0)), ctypes.byref(exponent_pairs),
    )  # fmt: skip
    if outlier_count < 0:
        pages.give_back(tiles)
        return None
    return PackedBf16(tiles, outliers[:outlier_count].clone(), offsets, exponent_pairs.value)


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, inputs) → integers from -127 to 127, and a scale for each output, padded to whole blocks."""
    scales = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    values = (weight.float() / scales[:, None]).round().to(torch.int8)
    return values, functional.pad(scales, (0, -len(scales) % BLOCK_OUTPUTS)).contiguous()
