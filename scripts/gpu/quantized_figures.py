"""The figures of `figures` with weights of 8 and 4 bits, and the kernel's matmul beside the one of full weights.

Floating-point codes of 8 bits (fp8) are measured where the device has them.
"""

from __future__ import annotations

import dataclasses

import torch
from engine.config import FP8, INT4, INT8
from engine.runners.gpu import block_attention, quantized_linear
from engine.runners.gpu.quantized_linear import GROUP, QuantizedLinear
from engine.runners.native.quantized import Quantized
from figures import measure_shape
from kernel_figures import seconds_of
from machine_limits import Limits
from random_models import DTYPE, release, shapes
from stage import Options, Report, Skipped

# Of Llama 8B: gate with up, and down.
_MATRICES = ((28_672, 4096), (4096, 14_336))
_ROWS = (1, 16, 64, 512)
_TINY_MATRICES, _TINY_ROWS = ((64, 96),), (1, 17)


def run(options: Options, report: Report) -> None:
    device = torch.device(options.device)
    if not block_attention.is_possible(device):
        raise Skipped("triton-lang computes on a GPU alone; TRITON_INTERPRET=1 interprets it")
    # The interpreter multiplies no bfloat16.
    dtype = DTYPE if options.on_gpu else torch.float16
    limits = Limits.measured(DTYPE, options.device)
    for outputs, inputs in _TINY_MATRICES if options.tiny else _MATRICES:
        for weights in _weights(device):
            for rows in _TINY_ROWS if options.tiny else _ROWS:
                _time_matmul(outputs, inputs, weights, rows, dtype, device, limits.read, report)
    release(options.device)
    if not options.on_gpu:
        return
    by_name = {shape.name: shape for shape in shapes(options)}
    # The search for 4-bit scales takes half a minute for 8B weights, more than a short run has.
    for name, weights in (("llama-8b", _weights(device)[0]), ("gpt2-124m", INT4)):
        measure_shape(dataclasses.replace(by_name[name], batches=(1, 64)), options, limits, report, weights)
        release(options.device)


def _weights(device: torch.device) -> tuple[str, ...]:
    """Those that the device multiplies."""
    return (FP8, INT8, INT4) if quantized_linear.has_floats(device) else (INT8, INT4)


@torch.inference_mode()
def _time_matmul(
    outputs: int, inputs: int, weights: str, count: int, dtype: torch.dtype, device: torch.device, bandwidth: float,
    report: Report,
) -> None:  # fmt: skip
    bits = 4 if weights == INT4 else 8
    groups = 1 if bits == 8 else inputs // GROUP
    highest = 2 ** (bits - 1)
    codes = torch.randint(1 - highest, highest, (outputs, inputs), dtype=torch.int8, device=device)
    if weights == FP8:
        codes = codes.to(torch.float8_e4m3fn)
    layer = QuantizedLinear(Quantized(codes, torch.rand(outputs, groups), None, bits), None, dtype, device)
    full = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
    rows = torch.randn(count, inputs, device=device).to(dtype)
    own, other = seconds_of(lambda: layer(rows), device), seconds_of(lambda: full(rows), device)
    read = outputs * inputs * bits / 8 + 2 * outputs * groups
    report(
        matrix=f"{outputs} × {inputs}", weights=weights, rows=count, microseconds=round(1e6 * own, 1),
        full_microseconds=round(1e6 * other, 1), of_bandwidth=round(read / own / bandwidth, 3),
    )  # fmt: skip
