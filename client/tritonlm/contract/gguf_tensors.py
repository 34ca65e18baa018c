"""Where a checkpoint's tensors lie in GGUF files: gguf_tensors.json, which names them as Hugging Face's code does.

`tritonlm.checkpoints.gguf` writes it next to config.json, and the engine reads it. This module knows the types of
tensors and their sizes, not how numbers are stored in them, and no architecture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

FILE_NAME = "gguf_tensors.json"
# The supported types: numbers in a block, and bytes of a block.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
}  # fmt: skip
# first, end, step
Rows = tuple[int, int, int]


def byte_count(type_name: str, numbers: int) -> int:
    block, size = BLOCKS[type_name]
    return numbers // block * size


@dataclass(frozen=True)
class StoredTensor:
    """Numbers of the type `type` from `offset` of `file`, row by row, and how they become the tensor:

    the slices `rows` of the stored rows, one below the other (all rows, if empty), plus `add`, then transposed.
    """

    file: str
    offset: int
    type: str
    stored_shape: tuple[int, ...]
    rows: tuple[Rows, ...] = ()
    add: float = 0.0
    transposed: bool = False

    @property
    def byte_count(self) -> int:
        return byte_count(self.type, math.prod(self.stored_shape))

    @property
    def row_count(self) -> int:
        """The rows that are taken."""
        return sum(len(range(*part)) for part in self.rows) if self.rows else self.stored_shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.row_count, *self.stored_shape[1:])
        return shape[::-1] if self.transposed else shape

    def check(self) -> None:
        """Raise ValueError unless it describes a tensor."""
        block, _ = BLOCKS[self.type]
        is_plain = self.file and Path(self.file).name == self.file and self.offset >= 0
        if not is_plain or not 1 <= len(self.stored_shape) <= 2 or min(self.stored_shape) < 1:
            raise ValueError("neither a vector nor a matrix in a file of this folder")
        if self.stored_shape[-1] % block:
            raise ValueError(f"rows of {self.stored_shape[-1]} numbers in blocks of {block}")
        for first, end, step in self.rows:
            if not 0 <= first < end <= self.stored_shape[0] or step < 1:
                raise ValueError(f"it has no rows {first} to {end}")


def write(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    content = {name: asdict(tensor) for name, tensor in tensors.items()}
    (folder / FILE_NAME).write_text(json.dumps({"tensors": content}, separators=(",", ":")), encoding="utf-8")


def read(folder: Path) -> dict[str, StoredTensor]:
    file = folder / FILE_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: _tensor(entry) for name, entry in content["tensors"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def parameter_count(tensors: Iterable[StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _tensor(entry: dict[str, Any]) -> StoredTensor:
    shape = tuple(int(size) for size in entry["stored_shape"])
    rows = tuple((int(first), int(end), int(step)) for first, end, step in entry["rows"])
    place = str(entry["file"]), int(entry["offset"]), str(entry["type"])
    tensor = StoredTensor(*place, shape, rows, float(entry["add"]), bool(entry["transposed"]))
    tensor.check()
    return tensor
