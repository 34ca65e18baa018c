"""The names, types and shapes of a checkpoint's tensors, from the headers of its files. No weights are read."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from tritonlm.contract import Checkpoint, gguf_tensors
from tritonlm.contract.errors import CheckpointError

# A longer header is a damaged file; the format's own library has the same limit.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
_BITS = {"F64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I64": 64, "I16": 16}


@dataclass(frozen=True)
class Tensor:
    name: str
    # As the file calls it: BF16, F32, Q4_K …
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in its file."""
        if self.dtype in gguf_tensors.BLOCKS:
            return gguf_tensors.byte_count(self.dtype, self.count)
        return self.count * _BITS.get(self.dtype, 8) // 8


def tensors_of(checkpoint: Checkpoint) -> list[Tensor]:
    if (checkpoint.folder / gguf_tensors.FILE_NAME).exists():
        stored = gguf_tensors.read(checkpoint.folder)
        return [Tensor(name, tensor.type, tensor.shape) for name, tensor in stored.items()]
    return [tensor for file in checkpoint.weight_files() for tensor in _safetensors(file)]


def _safetensors(file: Path) -> list[Tensor]:
    """The header: its length in eight bytes, then JSON."""
    try:
        with file.open("rb") as opened:
            (length,) = _LENGTH.unpack(opened.read(_LENGTH.size))
            if length > min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return [Tensor(name, entry["dtype"], tuple(map(int, entry["shape"]))) for name, entry in entries.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is not a valid safetensors file: {error}") from None
