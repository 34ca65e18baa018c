"""Linear layers on a CPU with their weights in oneDNN's own layout, packed once at load.

With few rows a matrix product spends its time reading the weights, and the packed layout reads them at the memory's
pace. The numbers are those of `torch.nn.functional.linear` up to the order of summation. Where oneDNN has no products
of bfloat16 (a processor without AVX-512), such weights are kept as float32. It knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# The layout hardly depends on the number of rows: this one is good for decoding and for prompts.
_ROWS = 32


class PackedLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` has the shape (outputs, inputs)."""
        super().__init__()
        # Plain attributes: a packed weight is opaque, and nothing may move or save it.
        self._dtype = kept_as(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self._dtype).contiguous(), _ROWS)
        self._bias = None if bias is None else bias.detach().to(self._dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(1, rows, inputs) of the flat batch → (1, rows, outputs)."""
        count, dtype = rows.shape[-2], rows.dtype
        rows = rows.to(self._dtype)
        if (padding := rounded_up(count) - count) > 0:
            rows = functional.pad(rows, (0, 0, 0, padding))
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return (result[..., :count, :] if padding else result).to(dtype)


def rounded_up(count: int) -> int:
    """The number of rows to compute: oneDNN compiles and keeps code for each number that it meets, so let it meet few.

    2 to 8, then four steps to each power of two: 10, 12, 14, 16, 20, 24, 28, 32, 40 … Never 1: a single row may be
    summed in another order than the same row among others.
    """
    count = max(count, 2)
    step = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // step) * step


def is_possible(device: torch.device, dtype: torch.dtype) -> bool:
    packable = dtype in (torch.float32, torch.bfloat16)
    return device.type == "cpu" and packable and torch._C._has_mkldnn


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """The type of packed weights. torch's own products of bfloat16 take ten times as long as float32's there."""
    widened = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if widened else dtype


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Replace every linear layer of the model; a weight that only they used is freed."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    layer: Any
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, PackedLinear(layer.weight, layer.bias))
            elif type(layer) is Conv1D:
                setattr(module, name, PackedLinear(layer.weight.t(), layer.bias))
