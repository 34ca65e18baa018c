"""Linear layers on a CPU with weights in oneDNN's packed layout, reordered once at load.

With few rows a matmul is bound by reading the weights, and the packed layout reads them at full memory bandwidth. The
results equal those of `torch.nn.functional.linear` up to the order of summation. If oneDNN has no bfloat16 matmul (a
processor without AVX-512), such weights are stored as float32. This module knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# The row count that oneDNN optimizes the layout for. This one suits decoding and prompts.
_ROWS = 32


class PackedLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` has the shape (outputs, inputs)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Plain attributes, no parameters: a packed weight is opaque and must not be moved or saved.
        self._dtype = packed_dtype(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self._dtype).contiguous(), _ROWS)
        self._bias = None if bias is None else bias.detach().to(self._dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(1, rows, inputs) of the flat batch → (1, rows, outputs)."""
        count, dtype = rows.shape[-2], rows.dtype
        rows = rows.to(self._dtype)
        if (padding := padded_rows(count) - count) > 0:
            rows = functional.pad(rows, (0, 0, 0, padding))
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return (result[..., :count, :] if padding else result).to(dtype)


def padded_rows(count: int) -> int:
    """The padded number of rows. oneDNN compiles and caches code for each number of rows, so few numbers are used.

    2 to 8, then four steps to each power of two: 10, 12, 14, 16, 20, 24, 28, 32, 40 … Never 1: a single row may be
    summed in another order than the same row in a batch.
    """
    count = max(count, 2)
    step = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // step) * step


def is_possible(device: torch.device, dtype: torch.dtype) -> bool:
    packable = dtype in (torch.float32, torch.bfloat16)
    return device.type == "cpu" and packable and torch._C._has_mkldnn


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of packed weights. Without oneDNN's bfloat16, torch's matmul takes ten times as long as in float32."""
    use_float32 = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if use_float32 else dtype


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Replace every linear layer of the model, and free the original weights."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    layer: Any
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, PackedLinear(layer.weight, layer.bias))
            elif type(layer) is Conv1D:
                setattr(module, name, PackedLinear(layer.weight.t(), layer.bias))
