"""The tensors of checkpoints whose safetensors are quantized, under the names and in the shapes of the model.

`get` dequantizes as the format's own code does; `quantized` returns integers in groups where the file has such. This
package knows how numbers are stored (tritonlm.contract.quantization says where), not what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from tritonlm.contract.quantization import Encoding, Layout

from ..quantized import Quantized
from .floats import read_float8, read_mxfp4
from .integers import Integers, Parts, read_integers

__all__ = ["QuantizedSource"]


class _Files(Protocol):
    """The stored tensors."""

    def get(self, name: str, index: int | None = None) -> torch.Tensor: ...

    def close(self) -> None: ...


class QuantizedSource:
    def __init__(self, files: _Files, layouts: Mapping[str, Layout], dtype: torch.dtype) -> None:
        """`dtype` is that of dequantized tensors."""
        self._files, self._layouts, self._dtype = files, layouts, dtype

    def names(self) -> Iterable[str]:
        return self._layouts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layouts[name].shape

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        layout = self._layouts[name]
        if layout.encoding == Encoding.MXFP4:
            numbers = range(layout.shape[0]) if index is None else [index]
            matrices = [read_mxfp4(self._parts(layout, n)).dequantized().to(self._dtype).t() for n in numbers]
            return matrices[0] if index is not None else torch.stack(matrices)
        if layout.encoding == Encoding.PLAIN:
            tensor = self._files.get(layout.parts["values"], index)
            return tensor.to(self._dtype) if tensor.dtype.itemsize == 1 else tensor
        if (integers := self._integers(layout)) is None:
            return read_float8(layout, self._parts(layout, index), self._dtype)
        matrix = integers.dequantized(self._dtype)
        return matrix.t().contiguous() if layout.transposed else matrix

    def quantized(self, name: str, index: int | None = None) -> Quantized | None:
        """(outputs, inputs), also where the tensor's shape is (inputs, outputs); of a stack the matrix `index`.

        None where the tensor is stored as other numbers than integers in groups of consecutive inputs.
        """
        layout = self._layouts[name]
        if layout.encoding == Encoding.MXFP4 and index is not None:
            return read_mxfp4(self._parts(layout, index))
        integers = self._integers(layout)
        return None if integers is None else integers.quantized()

    def _integers(self, layout: Layout) -> Integers | None:
        """None where the numbers are no integers."""
        if layout.encoding in (Encoding.PLAIN, Encoding.MXFP4) or layout.is_float:
            return None
        return read_integers(layout, self._parts(layout))

    def _parts(self, layout: Layout, index: int | None = None) -> Parts:
        return lambda role: self._files.get(layout.parts[role], index)

    def close(self) -> None:
        self._files.close()
