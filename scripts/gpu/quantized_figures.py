"""The figures of `figures` with weights of 8 and 4 bits, and the kernel's matmul beside the one of full weights."""

from __future__ import annotations

import dataclasses

import torch
from engine.runners.gpu import block_attention
from engine.runners.gpu.quantized_linear import GROUP, QuantizedLinear
from engine.runners.native.quantized import Quantized
from figures import measure_shape
from kernels import seconds_of
from machine_limits import Limits
from random_models import DTYPE, release, shapes
from stage import Options, Report

# Of Llama 8B: gate with up, and down.
_MATRICES = ((28_672, 4096), (4096, 14_336))
_ROWS = (1, 16, 64, 512)


def run(options: Options, report: Report) -> None:
    device = torch.device(options.device)
    if not block_attention.is_possible(device):
        report(missing=["triton"], remedy="install triton-lang, and run it on a GPU")
        return
    limits = Limits.measured(DTYPE, options.device)
    for outputs, inputs in _MATRICES:
        for bits in (8, 4):
            _time_matmul(outputs, inputs, bits, device, limits.read, report)
    release(options.device)
    by_name = {shape.name: shape for shape in shapes(options)}
    # The search for 4-bit scales takes half a minute for 8B weights, more than a lease has.
    for name, weights in (("llama-8b", "int8"), ("gpt2-124m", "int4")):
        measure_shape(dataclasses.replace(by_name[name], batches=(1, 64)), options, limits, report, weights)
        release(options.device)


def _time_matmul(outputs: int, inputs: int, bits: int, device: torch.device, bandwidth: float, report: Report) -> None:
    groups = 1 if bits == 8 else inputs // GROUP
    highest = 2 ** (bits - 1)
    codes = torch.randint(1 - highest, highest, (outputs, inputs), dtype=torch.int8, device=device)
    layer = QuantizedLinear(Quantized(codes, torch.rand(outputs, groups), None, bits), None, DTYPE, device)
    full = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=DTYPE)
    with torch.inference_mode():
        for count in _ROWS:
            rows = torch.randn(count, inputs, device=device, dtype=DTYPE)
            own, other = seconds_of(lambda rows=rows: layer(rows)), seconds_of(lambda rows=rows: full(rows))  # type: ignore[misc]
            read = outputs * inputs * bits / 8 + 2 * outputs * groups
            report(
                matrix=f"{outputs} × {inputs}", bits=bits, rows=count, microseconds=round(1e6 * own, 1),
                full_microseconds=round(1e6 * other, 1), of_bandwidth=round(read / own / bandwidth, 3),
            )  # fmt: skip
