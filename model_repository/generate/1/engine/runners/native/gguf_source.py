"""The tensors of GGUF files, by the names and in the shapes that gguf_tensors.json gives them.

A tensor is dequantized when it is read, some rows at a time, out of the mapped file: vectors into float32, matrices
into the dtype that the source was opened with. This module knows no architecture, and no layout of the kernels.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract import CheckpointError, gguf_tensors
from tritonlm.contract.gguf_tensors import StoredTensor

from . import gguf_blocks
from .quantized import Quantized

# So many numbers at a time: their float32 fit into a core's cache.
_SLICE = 2**18
_MAX_THREADS = 4


def holds_gguf(folder: Path) -> bool:
    return (folder / gguf_tensors.FILE_NAME).is_file()


class GgufSource:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError(f"{folder} needs the package gguf to be loaded: pip install tritonlm[server]")
        self._folder, self._dtype = folder, dtype
        self._tensors = gguf_tensors.read(folder)
        self._files = {name: self._mapped(name) for name in {tensor.file for tensor in self._tensors.values()}}
        for name, tensor in self._tensors.items():
            if tensor.offset + tensor.byte_count > len(self._files[tensor.file]):
                raise CheckpointError(f"{folder} cannot be loaded: {tensor.file} ends before {name}")
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))), "tritonlm-dequantize")

    def _mapped(self, name: str) -> npt.NDArray[np.uint8]:
        try:
            # Writable for torch, which only reads.
            return np.memmap(self._folder / name, np.uint8, "c")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._folder} cannot be loaded: {name} cannot be read: {error}") from error

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        values = self._dequantized(tensor)
        if tensor.rows:
            values = torch.cat([values[first:end:step] for first, end, step in tensor.rows])
        if tensor.add:
            values = values + tensor.add
        values = values.t().contiguous() if tensor.transposed else values
        return values if index is None else values[index]

    def quantized(self, name: str, index: int | None = None) -> Quantized | None:
        """The matrix (outputs, inputs), as blocks hold it, valid until `close`; None where it is stored otherwise."""
        tensor = self._tensors[name]
        if len(tensor.stored_shape) != 2 or tensor.add or index is not None or tensor.type not in gguf_blocks.TYPES:
            return None
        stored = self._stored(tensor)
        if tensor.rows:
            stored = np.concatenate([stored[first:end:step] for first, end, step in tensor.rows])
        return gguf_blocks.quantized(stored, tensor.type)

    def _dequantized(self, tensor: StoredTensor) -> torch.Tensor:
        """The stored rows."""
        shape = tensor.stored_shape if len(tensor.stored_shape) == 2 else (1, *tensor.stored_shape)
        stored = self._stored(tensor)
        values = torch.empty(shape, dtype=torch.float32 if len(tensor.stored_shape) == 1 else self._dtype)
        count = max(1, _SLICE // shape[1])

        def fill(first: int) -> None:
            rows = dequantize(stored[first : first + count], tensor.type)
            values[first : first + count].copy_(torch.from_numpy(rows))

        # Waits for all, and raises what one raised.
        list(self._threads.map(fill, range(0, shape[0], count)))
        return values.view(tensor.stored_shape)

    def _stored(self, tensor: StoredTensor) -> npt.NDArray[np.uint8]:
        """The bytes of each row."""
        rows = tensor.stored_shape[0] if len(tensor.stored_shape) == 2 else 1
        return self._files[tensor.file][tensor.offset : tensor.offset + tensor.byte_count].reshape(rows, -1)

    def close(self) -> None:
        self._threads.shutdown()
        self._files.clear()
        self._tensors.clear()


def dequantize(rows: npt.NDArray[np.uint8], type_name: str) -> npt.NDArray[np.float32]:
    """The numbers of rows of bytes."""
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 (only checkpoints in GGUF files need it)

    # A copy: the mapped bytes may lie at any offset, which float32 may not.
    values = quants.dequantize(np.array(rows), GGMLQuantizationType[type_name])
    return np.ascontiguousarray(values, np.float32)
