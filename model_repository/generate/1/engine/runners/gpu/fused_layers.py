"""Replaces small layers of Hugging Face's code by ones of fewer launches: RMSNorm, and the MLP of gate, up and down.

A step of one sequence is bound by launches as much as by memory. Each replacement is compared with the layer that it
replaces, and taken only where it gives the same numbers, so this module knows forms of layers and no model families.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .block_attention import on_device

_log = logging.getLogger("tritonlm.engine")
_BLOCK = 1024
# Rows of the comparison, and the least accuracy that it demands: a unit in the last place of the dtype, of the largest.
_ROWS = 5
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class FusedRMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, epsilon: float, *, adds_one: bool) -> None:
        """`adds_one`: the factor is 1 + weight."""
        super().__init__()
        self.weight, self._epsilon, self._adds_one = weight, epsilon, adds_one

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        width = numbers.shape[-1]
        rows = numbers.reshape(-1, width)
        output = torch.empty(rows.shape, dtype=numbers.dtype, device=numbers.device)
        with on_device(numbers.device):
            _kernels().rms_norm[len(rows),](
                rows, self.weight, output, rows.stride(0), self._epsilon, width, _power_of_two(width), self._adds_one
            )
        return output.view(numbers.shape)


class FusedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), with gate and up as one matmul."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Module) -> None:
        super().__init__()
        joined = nn.Linear(gate.in_features, 2 * gate.out_features, bias=False, device="meta")
        joined.weight = nn.Parameter(torch.cat((gate.weight, up.weight)), requires_grad=False)
        self.gate_up, self.down = joined, down

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.down(silu_multiply(self.gate_up(numbers)))  # type: ignore[no-any-return]


def silu_multiply(both: torch.Tensor) -> torch.Tensor:
    """(…, 2 · width) → (…, width): silu of the first half times the second."""
    width = both.shape[-1] // 2
    output = both.new_empty(*both.shape[:-1], width)
    with on_device(both.device):
        _kernels().silu_multiply[output.numel() // width, -(-width // _BLOCK)](both, output, width, _BLOCK)
    return output


@torch.inference_mode()
def fuse(model: nn.Module, *, mlps: bool = True) -> int:
    """Replace what can be replaced, and return how many layers that are. `mlps`: MLPs, too."""
    count = 0
    try:
        # Children are replaced before they are visited, so the weights of a replaced layer are freed at once.
        for parent in model.modules():
            for name, layer in list(parent.named_children()):
                replacement = _replacement(layer, mlps)
                if replacement is not None:
                    setattr(parent, name, replacement)
                    count += 1
    except Exception as error:  # the compiler of triton-lang may raise anything
        _log.warning("%d layers are fused, and no more, because a kernel fails here: %s", count, error)
    return count


def _replacement(layer: nn.Module, mlps: bool) -> nn.Module | None:
    return next((other for other, width in _candidates(layer, mlps) if _gives_the_same(layer, other, width)), None)


def _candidates(layer: Any, mlps: bool) -> Iterator[tuple[nn.Module, int]]:
    """What could replace the layer, and the width of its input."""
    if type(layer).__name__.endswith("RMSNorm") and _has_one_input(layer.forward):
        parameters = dict(layer.named_parameters())
        epsilon = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
        if list(parameters) == ["weight"] and isinstance(epsilon, float):
            for adds_one in (False, True):
                yield FusedRMSNorm(layer.weight, epsilon, adds_one=adds_one), layer.weight.shape[0]
        return
    if not mlps:
        return
    gate, up, down = (getattr(layer, f"{part}_proj", None) for part in ("gate", "up", "down"))
    if type(gate) is not nn.Linear or type(up) is not nn.Linear or not isinstance(down, nn.Module):
        return
    is_silu = isinstance(act := getattr(layer, "act_fn", None), nn.SiLU) or type(act).__name__ == "SiLUActivation"
    is_plain = gate.bias is None and up.bias is None and gate.weight.shape == up.weight.shape
    if is_silu and is_plain and _has_one_input(layer.forward):
        yield FusedMLP(gate, up, down), gate.in_features


def _has_one_input(forward: Callable[..., Any]) -> bool:
    return len(inspect.signature(forward).parameters) == 1


def _gives_the_same(layer: nn.Module, replacement: nn.Module, width: int) -> bool:
    weight = next(layer.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)
    # Not of variance 1, so that a norm that subtracts the mean or leaves out the division is recognized.
    numbers = torch.randn(1, _ROWS, width, generator=generator, device=weight.device) * 3 + 1
    expected, result = (part(numbers.to(weight.dtype)).float() for part in (layer, replacement))
    largest = float(expected.abs().max())
    return bool((expected - result).abs().max() <= _TOLERANCE[weight.dtype] * max(largest, 1e-6))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _kernels() -> Any:
    from .kernels import layers  # noqa: PLC0415 (triton-lang is slow to import, and missing on most CPUs)

    return layers
