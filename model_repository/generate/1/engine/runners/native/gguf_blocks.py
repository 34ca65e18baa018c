"""The blocks of GGUF's quantized types as codes, scales and minima, without loss.

Each function takes bytes (rows, blocks, bytes of a block). This module knows how numbers are stored, not whose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .quantized import Quantized

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice E2M1's numbers.
_MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def quantized(rows: Bytes, type_name: str, block_bytes: int) -> Quantized:
    """Rows of bytes of one of TYPES."""
    return _READERS[type_name](np.ascontiguousarray(rows).reshape(len(rows), -1, block_bytes))


def _half(blocks: Bytes, first: int) -> Floats:
    return np.ascontiguousarray(blocks[..., first : first + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(…, n) → (…, 2 n): all low ones, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _crumbs(packed: Bytes) -> Bytes:
    """(…, n) → (…, 4 n): the lowest two bits of all, and so on."""
    return np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)


def _tensor(numbers: npt.NDArray[Any]) -> torch.Tensor:
    """(rows, …) → (rows, numbers of a row)."""
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(len(numbers), -1)))


def _result(codes: npt.NDArray[Any], scales: Floats, minima: Floats | None, bits: int, **form: Any) -> Quantized:
    return Quantized(
        _tensor(codes.astype(np.int8, copy=False)), _tensor(scales), None if minima is None else _tensor(minima), bits,
        **form,
    )  # fmt: skip


def _in_two_levels(
    codes: npt.NDArray[Any], steps: Floats, scales: npt.NDArray[Any], bits: int, minimum_steps: Floats | None = None,
    minima: npt.NDArray[Any] | None = None, **form: Any,
) -> Quantized:  # fmt: skip
    """`scales` and `minima` (rows, blocks, groups) are in units of the steps (rows, blocks)."""
    full_minima = None
    if minimum_steps is not None and minima is not None:
        full_minima = minimum_steps[..., None] * minima.astype(np.float32)
        form["minimum_steps"] = _tensor(minimum_steps)
    full_scales = steps[..., None] * scales.astype(np.float32)
    return _result(codes, full_scales, full_minima, bits, scale_steps=_tensor(steps), **form)


def _q4_0(blocks: Bytes) -> Quantized:
    return _result(_nibbles(blocks[..., 2:]).view(np.int8) - 8, _half(blocks, 0), None, 4)


def _q4_1(blocks: Bytes) -> Quantized:
    return _result(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2), 4, lowest=0)


def _fifth_bits(packed: Bytes) -> Bytes:
    bits: Bytes = np.unpackbits(packed, axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _q5_0(blocks: Bytes) -> Quantized:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return _result(codes.view(np.int8) - 16, _half(blocks, 0), None, 5)


def _q5_1(blocks: Bytes) -> Quantized:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return _result(codes, _half(blocks, 0), _half(blocks, 2), 5, lowest=0)


def _q8_0(blocks: Bytes) -> Quantized:
    return _result(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _half(blocks, 0), None, 8)


def _q2_k(blocks: Bytes) -> Quantized:
    packed, shape = blocks[..., :16], blocks.shape[:2]
    codes = _crumbs(blocks[..., 16:80].reshape(*shape, 2, 32))
    return _in_two_levels(codes, _half(blocks, 80), packed & 15, 2, -_half(blocks, 82), packed >> 4, lowest=0)


def _q3_k(blocks: Bytes) -> Quantized:
    shape = blocks.shape[:2]
    low = _crumbs(blocks[..., 32:96].reshape(*shape, 2, 32)).reshape(*shape, 256)
    # Bit n of byte i is the third bit of number 32 n + i.
    third = np.concatenate([blocks[..., :32] >> bit & 1 for bit in range(8)], axis=-1)
    packed = blocks[..., 96:108]
    scales = _nibbles(packed[..., :8]) | _crumbs(packed[..., 8:]) << 4
    return _in_two_levels((low | third << 2).view(np.int8) - 4, _half(blocks, 108), scales.view(np.int8) - 32, 3)


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and minima of Q4_K and Q5_K, of 6 bits each in 12 bytes."""
    first, second, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, high & 15 | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, high >> 4 | (second >> 6) << 4], axis=-1)
    return scales, minima


def _q4_k(blocks: Bytes) -> Quantized:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return _in_two_levels(codes, _half(blocks, 0), scales, 4, -_half(blocks, 2), minima, lowest=0)


def _q5_k(blocks: Bytes) -> Quantized:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    low = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 256)
    fifth = np.concatenate([blocks[..., 16:48] >> bit & 1 for bit in range(8)], axis=-1)
    return _in_two_levels(low | fifth << 4, _half(blocks, 0), scales, 5, -_half(blocks, 2), minima, lowest=0)


def _q6_k(blocks: Bytes) -> Quantized:
    shape = blocks.shape[:2]
    low = _nibbles(blocks[..., :128].reshape(*shape, 2, 64))
    codes = (low | _crumbs(blocks[..., 128:192].reshape(*shape, 2, 32)) << 4).view(np.int8) - 32
    return _in_two_levels(codes, _half(blocks, 208), np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), 6)


def _iq4_nl(blocks: Bytes) -> Quantized:
    return _result(_nibbles(blocks[..., 2:]), _half(blocks, 0), None, 4, lowest=0, table=_IQ4_VALUES)


def _iq4_xs(blocks: Bytes) -> Quantized:
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(*blocks.shape[:2], 8)
    high = np.stack([blocks[..., 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(*blocks.shape[:2], 8)
    codes = _nibbles(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))
    scales = (low | high << 4).view(np.int8) - 32
    return _in_two_levels(codes, _half(blocks, 0), scales, 4, lowest=0, table=_IQ4_VALUES)


def _mxfp4(blocks: Bytes) -> Quantized:
    # Half of the scale, since the table holds twice the numbers.
    scales = np.ldexp(np.float32(1), blocks[..., 0].astype(np.int32) - 128).astype(np.float32)
    return _result(_nibbles(blocks[..., 1:]), scales, None, 4, lowest=0, table=_MXFP4_VALUES)


_READERS: dict[str, Callable[[Bytes], Quantized]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
TYPES = frozenset(_READERS)
