"""The tensors of a checkpoint's files, by name. This module knows file formats, not what a tensor is for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from tritonlm.contract import Checkpoint, CheckpointError

from .gguf_source import GgufSource, holds_gguf
from .quantized import Quantized
from .quantized_files import QuantizedSource


class TensorSource(Protocol):
    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        """The tensor, or tensor[index]; it may lie in the mapped file."""

    def quantized(self, name: str, index: int | None = None) -> Quantized | None:
        """The matrix (outputs, inputs), or matrix `index` of a stack; None where it is stored as plain numbers."""

    def close(self) -> None:
        """Unmap the files."""


class SafetensorsSource:
    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        files = Checkpoint(folder).weight_files()
        try:
            for file in files:
                opened = safe_open(file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)  # type: ignore[no-untyped-call]
        except Exception as error:  # safetensors' errors have no common base class
            raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        opened = self._files[name]
        tensor: torch.Tensor = opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
        return tensor

    def quantized(self, name: str, index: int | None = None) -> Quantized | None:
        return None

    def close(self) -> None:
        self._files.clear()


def open_tensors(folder: Path, dtype: torch.dtype = torch.float32) -> TensorSource:
    """`dtype` is that of matrices which are stored in blocks, as in GGUF files, or quantized."""
    if holds_gguf(folder):
        return GgufSource(folder, dtype)
    files, layouts = SafetensorsSource(folder), Checkpoint(folder).quantized
    return QuantizedSource(files, layouts, dtype) if layouts else files
