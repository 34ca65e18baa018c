"""The names, types and shapes of a checkpoint's tensors, from the headers of its files. No weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonlm.contract import Checkpoint, gguf_tensors, quantization
from tritonlm.contract.safetensors_header import StoredTensor, read_header

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


def plain_tensors(config: Mapping[str, Any], stored: Sequence[Tensor]) -> tuple[list[Tensor], str | None]:
    """The tensors of the model, and how they are quantized: the stored ones and None, where those are plain.

    Raises QuantizationError.
    """
    if quantization.method_of(config) is None:
        return list(stored), None
    headers = {tensor.name: StoredTensor(tensor.dtype, tensor.shape) for tensor in stored}
    found = quantization.layouts(config, headers)
    tensors = [Tensor(name, _type_name(layout, headers), layout.shape) for name, layout in found.items()]
    return tensors, quantization.description(config, found)


def _type_name(layout: quantization.Layout, headers: Mapping[str, StoredTensor]) -> str:
    is_plain = layout.encoding == quantization.Encoding.PLAIN
    return headers[layout.parts["values"]].dtype if is_plain else layout.type_name


def tensors_of(checkpoint: Checkpoint) -> list[Tensor]:
    if (checkpoint.folder / gguf_tensors.FILE_NAME).exists():
        stored = gguf_tensors.read(checkpoint.folder)
        return [Tensor(name, tensor.type, tensor.shape) for name, tensor in stored.items()]
    headers = [read_header(file) for file in checkpoint.weight_files()]
    return [Tensor(name, *tensor) for header in headers for name, tensor in header.items()]
