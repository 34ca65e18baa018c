"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

Every count, length and offset is compared with the file's size and with fixed limits before anything is allocated, and
each kind of damage has its sentence. This module knows the format, not what a key or a tensor means.

    magic "GGUF" | version u32 | tensors u64 | keys u64
    for each key:    name str | type u32 | value            (str: length u64, bytes; array: type u32, count u64, values)
    for each tensor: name str | dimensions u32 | sizes u64… (the fastest first) | type u32 | offset u64
    padding to a multiple of general.alignment | the tensors' data, each at a multiple of it
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tritonlm.contract.errors import CheckpointError
from tritonlm.contract.gguf_tensors import BLOCKS, byte_count

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_HEADER = 256 * 1024**2
_MAX_KEYS, _MAX_TENSORS = 10_000, 100_000
_MAX_KEY_BYTES, _MAX_NAME_BYTES, _MAX_STRING_BYTES = 65_535, 256, 16 * 1024**2
# Of all arrays together: a vocabulary of 300,000 has a million strings and numbers.
_MAX_ELEMENTS = 16_000_000
_MAX_DIMENSIONS, _MAX_ALIGNMENT = 4, 1024**2
_DEFAULT_ALIGNMENT = 32
# The shortest tensor: an empty name, one dimension.
_TENSOR_BYTES, _KEY_BYTES = 32, 13

_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
# The numbers of the format's types of tensors; those without a layout in BLOCKS are refused by name.
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    file: Path
    name: str
    type: str
    # The slowest dimension first, as torch has it.
    shape: tuple[int, ...]
    # From the file's beginning.
    offset: int

    @property
    def byte_count(self) -> int:
        return byte_count(self.type, math.prod(self.shape))


@dataclass(frozen=True)
class Header:
    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def printable(value: Any, limit: int = 60) -> str:
    """A text of the file for a message: short, and without line ends and other control characters."""
    return repr(str(value)[:limit])[1:-1]


def read_header(file: Path) -> Header:
    """The file's header; raises CheckpointError, in one sentence, if it is damaged or not supported."""
    try:
        with file.open("rb") as opened:
            return _Parser(file, opened).header()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


class _Parser:
    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self._file, self._opened = file, opened
        self._size, self._position = os.fstat(opened.fileno()).st_size, 0
        self._elements = 0

    def header(self) -> Header:
        tensor_count, key_count = self._counts()
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string("a key", _MAX_KEY_BYTES)
            if key in metadata:
                raise self._error(f"has the key {key[:60]!r} twice")
            metadata[key] = self._value(f"the value of {printable(key)}", self._number("<u4", "a type"))
            if key == "general.alignment":
                self._check_alignment(metadata[key])
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        start = self._position + -self._position % alignment
        tensors = [self._placed(info, start, alignment) for info in infos]
        self._check_overlaps(tensors)
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) < len(tensors):
            twice = next(name for name in by_name if sum(tensor.name == name for tensor in tensors) > 1)
            raise self._error(f"has the tensor {twice!r} twice")
        return Header(self._file, metadata, by_name)

    def _counts(self) -> tuple[int, int]:
        if self._size < len(_MAGIC) or self._take(4, "the magic number") != _MAGIC:
            raise self._error("is not a GGUF file")
        version = self._number("<u4", "the version")
        if version and version & 0xFFFF == 0:
            raise self._error("is for processors of the other byte order")
        if version not in _VERSIONS:
            raise self._error(f"has version {version} of the format; supported are 2 and 3")
        tensor_count, key_count = self._number("<u8", "the count of tensors"), self._number("<u8", "the count of keys")
        for count, limit, size, what in (
            (tensor_count, _MAX_TENSORS, _TENSOR_BYTES, "tensors"), (key_count, _MAX_KEYS, _KEY_BYTES, "keys"),
        ):  # fmt: skip
            if count > limit or count * size > self._size:
                raise self._error(f"has {count:,} {what}, more than the limit of {limit:,} or than fit into it")
        return tensor_count, key_count

    def _value(self, what: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(what, _MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(what)
        return self._number(self._scalar(kind, what), what)

    def _array(self, what: str) -> list[Any]:
        kind, count = self._number("<u4", what), self._number("<u8", what)
        if kind == _ARRAY:
            raise self._error(f"nests arrays in {what}")
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise self._error(f"has an array of {count:,} elements in {what}, above the limit")
        if kind == _STRING:
            # A string takes 8 bytes or more.
            self._check_left(8 * count, what)
            return [self._string(what, _MAX_STRING_BYTES) for _ in range(count)]
        dtype = np.dtype(self._scalar(kind, what))
        values: list[Any] = np.frombuffer(self._take(count * dtype.itemsize, what), dtype).tolist()
        return values

    def _tensor_info(self) -> TensorInfo:
        name = self._string("a tensor's name", _MAX_NAME_BYTES)
        what = f"the description of tensor {name!r}"
        dimensions = self._number("<u4", what)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"has a tensor {name!r} of {dimensions} dimensions")
        shape = tuple(self._number("<u8", what) for _ in range(dimensions))[::-1]
        kind, offset = self._number("<u4", what), self._number("<u8", what)
        type_name = TENSOR_TYPES.get(kind, f"number {kind}")
        if type_name not in BLOCKS:
            raise self._error(f"has a tensor {name!r} of type {type_name}; supported are {', '.join(BLOCKS)}")
        if min(shape) < 1 or shape[-1] % BLOCKS[type_name][0]:
            raise self._error(f"has a tensor {name!r} of type {type_name} with the impossible shape {shape}")
        return TensorInfo(self._file, name, type_name, shape, offset)

    def _placed(self, tensor: TensorInfo, start: int, alignment: int) -> TensorInfo:
        """With the offset from the file's beginning."""
        offset = start + tensor.offset
        if tensor.offset % alignment:
            raise self._error(
                f"has tensor {tensor.name!r} at {tensor.offset}, no multiple of the alignment {alignment}"
            )
        if offset + tensor.byte_count > self._size:
            raise self._error(
                f"is incomplete: tensor {tensor.name!r} ends at byte {offset + tensor.byte_count:,} of {self._size:,}"
            )
        return TensorInfo(tensor.file, tensor.name, tensor.type, tensor.shape, offset)

    def _check_overlaps(self, tensors: Iterable[TensorInfo]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._error(f"has tensors that overlap: {before!r} and {tensor.name!r}")
            end, before = tensor.offset + tensor.byte_count, tensor.name

    def _check_alignment(self, alignment: Any) -> None:
        is_power = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT and not alignment & (alignment - 1)
        if not is_power or isinstance(alignment, bool):
            raise self._error(f"has the alignment {printable(alignment, 40)}, no power of two up to {_MAX_ALIGNMENT:,}")

    def _scalar(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise self._error(f"has the unknown type {kind} in {what}")
        return _SCALARS[kind]

    def _number(self, dtype: str, what: str) -> Any:
        kind = np.dtype(dtype)
        value = np.frombuffer(self._take(kind.itemsize, what), kind)[0]
        # 1e-06, not 9.999999974752427e-07.
        return float(str(value)) if dtype == "<f4" else value.item()

    def _string(self, what: str, limit: int) -> str:
        (length,) = struct.unpack("<Q", self._take(8, what))
        if length > limit:
            raise self._error(f"has a string of {length:,} bytes for {what}, above the limit of {limit:,}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._error(f"has a string that is not UTF-8 for {what}") from None

    def _check_left(self, count: int, what: str) -> None:
        if self._position + count > self._size:
            raise self._error(f"ends in the middle of its header, in {what}")
        if self._position + count > _MAX_HEADER:
            raise self._error(f"has a header above the limit of {_MAX_HEADER:,} bytes")

    def _take(self, count: int, what: str) -> bytes:
        self._check_left(count, what)
        taken = self._opened.read(count)
        if len(taken) < count:
            raise self._error(f"ends in the middle of its header, in {what}")
        self._position += count
        return taken

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._file} {text}")
