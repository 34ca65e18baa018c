"""A model in one GGUF file or several parts, and typed access to what its metadata says of the architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tritonlm.contract.errors import CheckpointError

from .header import Header, TensorInfo, printable, read_header
from .split_files import part_files

# More than any model has: of layers, of tokens (these cost nothing by themselves), and of anything else.
_MAX_LAYERS, _MAX_TOKENS, _MAX_SIZE = 1000, 100_000_000, 1_000_000
_TOKENS = ("context_length", "original_context_length", "sliding_window")


@dataclass(frozen=True)
class ModelFile:
    """`file` is the first part; the metadata are its own."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.file} cannot be used: {text}")

    @property
    def architecture(self) -> str:
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.error("it names no general.architecture")
        return architecture

    def value(self, name: str) -> Any:
        """A key of the architecture, ARCHITECTURE.name."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; in an array of one for each layer all must be equal."""
        value = self.value(name)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        value = default if value is None else value
        limit = _limit_of(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise self.error(
                f"its {self.architecture}.{name} is {printable(value)}, not a positive integer up to {limit:,}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.value(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(f"its {self.architecture}.{name} is {printable(value)}, not a number")
        return float(value)

    def optional(self, name: str) -> float | None:
        return None if self.value(name) is None else self.number(name)

    def window(self) -> int | None:
        """The sliding window of attention; 0 is none."""
        return self.size("attention.sliding_window") if self.value("attention.sliding_window") else None

    def flag(self, name: str, default: bool) -> bool:
        value = self.value(name)
        return default if value is None else bool(value)

    def text(self, name: str, default: str) -> str:
        value = self.value(name)
        return value if isinstance(value, str) else default

    def floats(self, tensor: TensorInfo) -> list[float]:
        """The values of a small float32 tensor."""
        if tensor.type != "F32" or len(tensor.shape) != 1:
            raise self.error(f"its tensor {printable(tensor.name)} is not a vector of type F32")
        values = np.fromfile(tensor.file, "<f4", count=tensor.shape[0], offset=tensor.offset)
        return [float(str(value)) for value in values]


def open_model(file: Path) -> ModelFile:
    """Reads the headers of all parts."""
    files = part_files(file)
    headers = [_read_part(part, file) for part in files]
    first = headers[0]
    declared = first.metadata.get("split.count", 1)
    if isinstance(declared, int) and declared not in (0, len(files)):
        raise CheckpointError(f"{first.file} is one of {declared:,} parts, and its name does not say which")
    tensors: dict[str, TensorInfo] = {}
    for number, header in enumerate(headers):
        if len(files) > 1 and header.metadata.get("split.no") != number:
            raise CheckpointError(f"{header.file} is not part {number + 1} of {len(files)}, as its name says")
        if twice := tensors.keys() & header.tensors.keys():
            raise CheckpointError(f"{header.file} has the tensor {min(twice)!r}, as another part has")
        tensors |= header.tensors
    expected = first.metadata.get("split.tensors.count")
    if len(files) > 1 and expected != len(tensors):
        count = f"{len(tensors)} tensors, not {printable(expected)}"
        raise CheckpointError(f"{first.file} and its other parts have {count}")
    return ModelFile(first.file, first.metadata, tensors)


def _read_part(part: Path, file: Path) -> Header:
    if part != file and not part.is_file():
        raise CheckpointError(f"{file} is one part of several, and {part.name} is missing next to it")
    return read_header(part)


def _limit_of(name: str) -> int:
    if name == "block_count":
        return _MAX_LAYERS
    return _MAX_TOKENS if name.rpartition(".")[2] in _TOKENS else _MAX_SIZE
