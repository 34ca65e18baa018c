"""The names, number types and shapes of a safetensors file's tensors, from its header. No numbers are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

from .errors import CheckpointError

# A longer header is a damaged file; the format's own library has the same limit.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")


class StoredTensor(NamedTuple):
    # As the format calls it: BF16, I32, F8_E4M3 …
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The header: its length in eight bytes, then JSON."""
    try:
        with file.open("rb") as opened:
            (length,) = _LENGTH.unpack(opened.read(_LENGTH.size))
            if length > min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: StoredTensor(entry["dtype"], tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is not a valid safetensors file: {error}") from None
