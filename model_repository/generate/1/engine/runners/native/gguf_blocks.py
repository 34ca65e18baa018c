"""The blocks of GGUF's quantized types as codes, scales and minima, without loss.

Each function takes bytes (rows, blocks, bytes of a block). Scales of float16 stay where they lie, others are read at
once; the kernels unpack codes when they pack a matrix (kernels/gguf_codes.hpp), and `unpack` does it here. This module
knows how numbers are stored, not whose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract.gguf_tensors import BLOCKS

from .quantized import MXFP4_TABLE, BlockType, Quantized

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class _Scales:
    """(rows, blocks, groups of a block): floats, or in two levels bytes that count the steps (rows, blocks)."""

    scales: npt.NDArray[Any]
    minima: npt.NDArray[Any] | None = None
    steps: Halves | None = None
    minimum_steps: Halves | None = None


@dataclass(frozen=True)
class _Type:
    """`codes` and `scales` read blocks; codes begin with `lowest`, or stand for the numbers of a table."""

    bits: int
    codes: Callable[[Bytes], npt.NDArray[Any]]
    scales: Callable[[Bytes], _Scales]
    lowest: int | None = 0
    table: tuple[int, ...] | None = None


def quantized(rows: Bytes, type_name: str) -> Quantized:
    """Rows of bytes of one of TYPES; the codes stay where they are."""
    kind, stored = _TYPES[type_name], _block_type(type_name)
    found = kind.scales(_blocks(rows, stored.block_bytes))
    return Quantized(
        torch.from_numpy(rows), _by_row(found.scales), _optional(found.minima),
        kind.bits, lowest=kind.lowest, scale_steps=_optional(found.steps),
        minimum_steps=_optional(found.minimum_steps), table=kind.table, stored_as=stored,
    )  # fmt: skip


def _by_row(numbers: npt.NDArray[Any]) -> torch.Tensor:
    """(rows, …) → (rows, numbers of a row), where they lie if their distance allows it; bytes have a sign."""
    flat = numbers.reshape(len(numbers), -1)
    return torch.from_numpy(flat.view(np.int8) if flat.dtype == np.uint8 else flat)


def _optional(numbers: npt.NDArray[Any] | None) -> torch.Tensor | None:
    return None if numbers is None else _by_row(numbers)


@functools.cache
def _block_type(type_name: str) -> BlockType:
    block_inputs, block_bytes = BLOCKS[type_name]

    def unpack(rows: torch.Tensor) -> torch.Tensor:
        codes = _TYPES[type_name].codes(_blocks(rows.numpy(), block_bytes))
        return torch.from_numpy(np.ascontiguousarray(codes.reshape(len(rows), -1)).astype(np.int8, copy=False))

    return BlockType(list(_TYPES).index(type_name) + 1, block_inputs, block_bytes, unpack)


def _blocks(rows: Bytes, block_bytes: int) -> Bytes:
    return rows.reshape(len(rows), -1, block_bytes)


def _half(blocks: Bytes, first: int) -> Halves:
    """A view: blocks of an even number of bytes begin at even addresses."""
    halves: Halves = blocks[..., first : first + 2].view(np.float16)[..., 0]
    return halves


def _nibbles(packed: Bytes) -> Bytes:
    """(…, n) → (…, 2 n): all low ones, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _crumbs(packed: Bytes) -> Bytes:
    """(…, n) → (…, 4 n): the lowest two bits of all, and so on."""
    return np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)


def _in_runs(blocks: Bytes, first: int, last: int, run: int) -> Bytes:
    """The bytes [first, last) of each block, in runs."""
    return blocks[..., first:last].reshape(*blocks.shape[:2], -1, run)


def _fifth_bits(packed: Bytes) -> Bytes:
    bits: Bytes = np.unpackbits(packed, axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _bit_planes(packed: Bytes) -> Bytes:
    """Bit n of byte i is a further bit of number 32 n + i."""
    return np.concatenate([packed >> bit & 1 for bit in range(8)], axis=-1)


def _halves(blocks: Bytes) -> _Scales:
    return _Scales(_half(blocks, 0)[..., None])


def _two_halves(blocks: Bytes) -> _Scales:
    return _Scales(_half(blocks, 0)[..., None], _half(blocks, 2)[..., None])


def _q2_k_scales(blocks: Bytes) -> _Scales:
    packed = blocks[..., :16]
    return _Scales(packed & 15, packed >> 4, _half(blocks, 80), -_half(blocks, 82))


def _q3_k_codes(blocks: Bytes) -> npt.NDArray[Any]:
    low = _crumbs(_in_runs(blocks, 32, 96, 32)).reshape(*blocks.shape[:2], 256)
    return (low | _bit_planes(blocks[..., :32]) << 2).view(np.int8) - 4


def _q3_k_scales(blocks: Bytes) -> _Scales:
    packed = blocks[..., 96:108]
    scales = _nibbles(packed[..., :8]) | _crumbs(packed[..., 8:]) << 4
    return _Scales(scales.view(np.int8) - 32, steps=_half(blocks, 108))


def _six_bit_pairs(blocks: Bytes) -> _Scales:
    """The eight scales and minima of Q4_K and Q5_K, of 6 bits each in 12 bytes."""
    # Byte by byte of all blocks: runs of four bytes would take several times as long.
    packed = np.ascontiguousarray(np.moveaxis(blocks[..., 4:16], -1, 0))
    first, second, high = packed[:4], packed[4:8], packed[8:]
    scales = np.concatenate([first & 63, high & 15 | (first >> 6) << 4])
    minima = np.concatenate([second & 63, high >> 4 | (second >> 6) << 4])
    return _Scales(np.moveaxis(scales, 0, -1), np.moveaxis(minima, 0, -1), _half(blocks, 0), -_half(blocks, 2))


def _q5_k_codes(blocks: Bytes) -> npt.NDArray[Any]:
    low = _nibbles(_in_runs(blocks, 48, 176, 32)).reshape(*blocks.shape[:2], 256)
    return low | _bit_planes(blocks[..., 16:48]) << 4


def _q6_k_codes(blocks: Bytes) -> npt.NDArray[Any]:
    low = _nibbles(_in_runs(blocks, 0, 128, 64))
    high = _crumbs(_in_runs(blocks, 128, 192, 32))
    return (low | high << 4).view(np.int8) - 32


def _q6_k_scales(blocks: Bytes) -> _Scales:
    return _Scales(np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), steps=_half(blocks, 208))


def _iq4_xs_scales(blocks: Bytes) -> _Scales:
    shape = (*blocks.shape[:2], 8)
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(shape)
    high = np.stack([blocks[..., 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(shape)
    return _Scales((low | high << 4).view(np.int8) - 32, steps=_half(blocks, 0))


def _mxfp4_scales(blocks: Bytes) -> _Scales:
    # Half of the scale, since the table holds twice the numbers.
    exponents = blocks[..., :1].astype(np.int32) - 128
    return _Scales(np.ldexp(np.float32(1), exponents).astype(np.float32))


# In the order of GgufType in kernels/gguf_codes.hpp, where kCodes precedes them.
_TYPES: dict[str, _Type] = {
    "Q4_0": _Type(4, lambda b: _nibbles(b[..., 2:]).view(np.int8) - 8, _halves, None),
    "Q4_1": _Type(4, lambda b: _nibbles(b[..., 4:]), _two_halves),
    "Q5_0": _Type(5, lambda b: (_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])).view(np.int8) - 16, _halves, None),
    "Q5_1": _Type(5, lambda b: _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8]), _two_halves),
    "Q8_0": _Type(8, lambda b: np.ascontiguousarray(b[..., 2:]).view(np.int8), _halves, None),
    "Q2_K": _Type(2, lambda b: _crumbs(_in_runs(b, 16, 80, 32)), _q2_k_scales),
    "Q3_K": _Type(3, _q3_k_codes, _q3_k_scales, None),
    "Q4_K": _Type(4, lambda b: _nibbles(_in_runs(b, 16, 144, 32)), _six_bit_pairs),
    "Q5_K": _Type(5, _q5_k_codes, _six_bit_pairs),
    "Q6_K": _Type(6, _q6_k_codes, _q6_k_scales, None),
    "IQ4_NL": _Type(4, lambda b: _nibbles(b[..., 2:]), _halves, table=_IQ4_VALUES),
    "IQ4_XS": _Type(4, lambda b: _nibbles(_in_runs(b, 8, 136, 16)), _iq4_xs_scales, table=_IQ4_VALUES),
    "MXFP4": _Type(4, lambda b: _nibbles(b[..., 1:]), _mxfp4_scales, table=MXFP4_TABLE),
}
TYPES = frozenset(_TYPES)
