"""GGUF files byte by byte, so that any part of them can be wrong. It knows the format's layout."""

from __future__ import annotations

import struct
from collections.abc import Sequence

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10


def string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def text_key(name: str, value: str) -> bytes:
    return key(name, STRING, string(value))


def number_key(name: str, value: int) -> bytes:
    return key(name, UINT32, struct.pack("<I", value))


def array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + content


def tensor(name: str, sizes: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """`sizes` in the format's order, the fastest first."""
    dimensions = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *, magic: bytes = b"GGUF",
    version: int = 3, counts: tuple[int, int] | None = None, alignment: int = 32,
) -> bytes:  # fmt: skip
    """`counts` of tensors and keys, where they are not the real ones."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join((*keys, *tensors))
    return header + b"\0" * (-len(header) % alignment) + data
