"""Linear layers on a CPU with their weights in oneDNN's own layout, packed once at load.

With few rows a matrix product spends its time reading the weights, and the packed layout reads them at the memory's
pace. The numbers are those of `torch.nn.functional.linear` up to the order of summation. It knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The layout hardly depends on the number of rows: this one is good for decoding and for prompts.
_ROWS = 32


class PackedLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` has the shape (outputs, inputs)."""
        super().__init__()
        # Plain attributes: a packed weight is opaque, and nothing may move or save it.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return result


def is_possible(device: torch.device, dtype: torch.dtype) -> bool:
    packable = dtype in (torch.float32, torch.bfloat16)
    return device.type == "cpu" and packable and torch._C._has_mkldnn


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
