"""Linear layers on a GPU with weights of 8 bits (a scale for each output) or 4 bits (one for each 32 inputs).

Codes of 8 bits are whole numbers or, with `floats`, floating-point ones (e4m3): an outlier costs the others less then.
The numbers of a layer's input and output keep their type. This module knows layers and no model families.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tritonlm.contract import CheckpointError

from ..native.quantize import quantize_groups
from ..native.quantized import Quantized
from .block_attention import on_device

GROUP = 32
# Inputs that a program multiplies at a time: whole groups.
_STEP = 128
_INT8_MAX = 127
_FLOAT8 = torch.float8_e4m3fn
# The first devices that convert 8-bit floating-point numbers: Ada and Hopper.
_FLOAT8_CAPABILITY = (8, 9)
# Up to so many rows a matmul is bound by reading its weights, and narrow tiles keep all multiprocessors busy.
_FEW_ROWS = 16
# Of the largest result of a comparison.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class QuantizedLinear(nn.Module):
    def __init__(self, weight: Quantized, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        assert weight.minima is None, "layers are quantized symmetrically here"
        self.out_features, self.in_features = weight.shape
        self._bits = weight.bits
        self._padded = -(-self.in_features // _STEP) * _STEP
        self._floats = weight.codes.dtype == _FLOAT8
        codes = weight.codes.view(torch.uint8) if self._floats else weight.codes
        # Without padding, the codes of a transposed matrix (Conv1D) would stay transposed.
        codes = functional.pad(codes.to(device), (0, self._padded - self.in_features)).contiguous()
        self._codes = _packed(codes) if self._bits == 4 else codes
        self._group = self._padded if weight.scales.shape[1] == 1 else weight.group
        scales = weight.scales.to(device).t()
        # Float16 holds the scales of groups exactly; those of outputs are few.
        half = scales.half()
        scales = half if torch.equal(half.float(), scales) else scales
        self._scales = functional.pad(scales, (0, 0, 0, self._padded // self._group - len(scales))).contiguous()
        self._bias = None if bias is None else bias.to(dtype)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        rows = numbers.reshape(-1, self.in_features)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        output = torch.empty(len(rows), self.out_features, dtype=numbers.dtype, device=numbers.device)
        block_m, block_n = (16, 32) if len(rows) <= _FEW_ROWS else (64, 64)
        grid = (-(-self.out_features // block_n), -(-len(rows) // block_m))
        with on_device(numbers.device):
            _kernels().multiply[grid](
                rows, self._codes, self._scales, self._scales if self._bias is None else self._bias, output, len(rows),
                self.out_features, rows.stride(0), self.in_features, self._padded, self._group, self._bits, _STEP,
                block_m, block_n, self._bias is not None, self._floats,
            )  # fmt: skip
        return output.view(*numbers.shape[:-1], self.out_features)


def has_floats(device: torch.device) -> bool:
    """Whether the device converts 8-bit floating-point numbers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


@torch.no_grad()
def quantize(model: Any, bits: int, head_bits: int, *, floats: bool = False) -> tuple[int, int]:
    """Quantize the linear layers, and the LM head in its own bits. Return bytes of weights before and after.

    Layers whose inputs are no whole groups, and experts that are no linear layers, keep their numbers.
    """
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    head = model.get_output_embeddings()
    before = after = 0
    for parent in model.modules():
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear and type(layer) is not Conv1D:
                continue
            weight: torch.Tensor = layer.weight if type(layer) is nn.Linear else layer.weight.t()
            used = head_bits if layer is head else bits
            if used == 4 and weight.shape[1] % GROUP:
                continue
            quantized = _quantized(weight, used, floats=floats)
            replacement = QuantizedLinear(quantized, layer.bias, weight.dtype, weight.device)
            _check(replacement, quantized, layer.bias, weight)
            setattr(parent, name, replacement)
            before += weight.nbytes
            after += replacement._codes.nbytes + replacement._scales.nbytes
    return before, after


def _quantized(weight: torch.Tensor, bits: int, *, floats: bool = False) -> Quantized:
    if bits == 4:
        # The search for the best scales runs on the CPU, and gives the weights that the CPU's kernels have.
        return quantize_groups(weight.detach().float().cpu().contiguous(), bits, GROUP)
    numbers = weight.float()
    largest = torch.finfo(_FLOAT8).max if floats else _INT8_MAX
    scales = numbers.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    if not bool(scales.isfinite().all()):
        raise CheckpointError("the weights have numbers that are not finite, which cannot be quantized")
    codes = numbers / scales
    return Quantized(codes.to(_FLOAT8) if floats else codes.round().to(torch.int8), scales, None, bits)


def _check(replacement: QuantizedLinear, weight: Quantized, bias: torch.Tensor | None, like: torch.Tensor) -> None:
    """Compare a few rows with a plain matmul: a kernel that a device computes wrongly must not serve."""
    generator = torch.Generator(like.device).manual_seed(0)
    for count in (1, _FEW_ROWS + 1):
        rows = torch.randn(count, replacement.in_features, generator=generator, device=like.device).to(like.dtype)
        # A part of the outputs: the whole matrix in float32 may not fit beside the model.
        part = slice(0, min(replacement.out_features, 64))
        offset = 0 if bias is None else bias[part].float()
        expected = rows.float() @ weight.part(part).dequantized().to(like.device).t() + offset
        error = float((replacement(rows)[:, part].float() - expected).abs().max())
        if not error <= _TOLERANCE[like.dtype] * float(expected.abs().max().clamp(min=1e-6)):
            raise CheckpointError(
                f"a kernel for weights of {weight.bits} bits is off by {error:.2g} on this device; use weights full"
            )


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) of codes from -8 to 7 → bytes (outputs, inputs / 2) in the kernel's order."""
    runs = (codes + 8).to(torch.uint8).view(len(codes), -1, 2, _STEP // 2)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1).contiguous()


@functools.cache
def _kernels() -> Any:
    from .kernels import quantized  # noqa: PLC0415 (triton-lang is slow to import, and missing on most CPUs)

    return quantized
