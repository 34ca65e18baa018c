"""Adapters in Hugging Face's code: a hook on each linear layer adds B (A x) to the rows of the requests that want it.

The rows of one adapter are computed together. The base's matmul stays as it is, in whatever form its weights are. This
module knows layers and rows, and no model families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tritonlm.contract import CheckpointError

from ..adapters.loaded import AdapterWeights
from ..adapters.lora import LoraAdapter, LowRank
from ..scheduling.scheduler import Slice
from . import packed_linear
from .gpu.quantized_linear import QuantizedLinear

# The layers of a mixture of experts: not all rows of a step pass them.
_EXPERTS = ".experts."
_MOST_NAMED = 3


class LayerWeights:
    """A and B of one layer, as the base's own linear layers are computed on this device."""

    def __init__(self, layer: LowRank, dtype: torch.dtype, device: torch.device) -> None:
        a, b = layer.a.to(device, dtype), layer.b.to(device, dtype)
        self.nbytes = a.nbytes + b.nbytes
        packs = packed_linear.is_possible(device, dtype)
        self._a: nn.Module = packed_linear.PackedLinear(a, None) if packs else _Plain(a)
        self._b: nn.Module = packed_linear.PackedLinear(b, None) if packs else _Plain(b)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._b(self._a(rows))
        return result


class _Plain(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._weight = weight.contiguous()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight)


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """An adapter as this module applies it."""

    layers: Mapping[str, LayerWeights]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())


@dataclass(frozen=True)
class _Group:
    """The rows of one adapter in the current step; None: all rows."""

    weights: ModelWeights
    rows: torch.Tensor | None


class LowRankHooks:
    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Installs a hook on each linear layer but the one of the logits."""
        self._dtype, self._device = dtype, device
        self._groups: list[_Group] = []
        # (outputs, inputs) of each layer that has a hook.
        self._shapes: dict[str, tuple[int, int]] = {}
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            shape = _shape(module)
            if shape and module is not head and _EXPERTS not in f".{name}.":
                self._shapes[name] = shape
                module.register_forward_hook(self._hook(name))

    def load(self, adapter: LoraAdapter) -> AdapterWeights:
        """Raises CheckpointError that names a layer which this model has not, or not in this shape."""
        unknown = [name for name in adapter.layers if name not in self._shapes]
        if unknown:
            named = ", ".join(name[:200] for name in unknown[:_MOST_NAMED])
            raise CheckpointError(
                f"adapter {adapter.name!r} changes {named}{' …' if len(unknown) > _MOST_NAMED else ''}, which are no "
                "linear layers that adapters can change in this LM; check that it was trained from this base"
            )
        for name, layer in adapter.layers.items():
            if (layer.outputs, layer.inputs) != self._shapes[name]:
                raise CheckpointError(
                    f"adapter {adapter.name!r} has {name} as {layer.outputs} × {layer.inputs}, and this LM as "
                    f"{' × '.join(map(str, self._shapes[name]))}; it was trained from another base"
                )
        with torch.inference_mode():
            layers = {name: LayerWeights(layer, self._dtype, self._device) for name, layer in adapter.layers.items()}
        return ModelWeights(layers)

    def select(self, plan: Sequence[Slice]) -> None:
        """Apply the adapters of these slices to their rows from now on."""
        rows: dict[ModelWeights, list[int]] = {}
        count = 0
        for piece in plan:
            if piece.request.adapter:
                weights = piece.request.adapter.weights
                assert isinstance(weights, ModelWeights)
                rows.setdefault(weights, []).extend(range(count, count + piece.count))
            count += piece.count
        self._groups = [
            _Group(weights, None if len(own) == count else torch.tensor(own, device=self._device))
            for weights, own in rows.items()
        ]

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            for group in self._groups:
                layer = group.weights.layers.get(name)
                if layer is None:
                    continue
                if group.rows is None:
                    output = output + layer(inputs[0])
                else:
                    output = output.index_add(-2, group.rows, layer(inputs[0].index_select(-2, group.rows)))
            return output

        return add


def wants_adapters(plan: Sequence[Slice]) -> bool:
    return any(piece.request.adapter for piece in plan)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer; None for any other module."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    if isinstance(module, nn.Linear | packed_linear.PackedLinear | QuantizedLinear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None
