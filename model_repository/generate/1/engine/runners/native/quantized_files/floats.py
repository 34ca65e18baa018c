"""Floating-point numbers of eight and four bits: FP8 with scales for blocks, and MXFP4.

    FP8     weight = value * scale, one scale for each block of outputs and inputs
    MXFP4   weight = value * 2^(scale - 127), one scale for each 32 inputs; two values of 1 sign, 2 exponent and
            1 mantissa bit in a byte, the first in its low half

This module reads no files.
"""

from __future__ import annotations

import torch
from tritonlm.contract.quantization import Layout

from ..quantized import MXFP4_TABLE, Quantized
from .integers import Parts

# Of a scale that is an exponent.
_BIAS = 127


def read_float8(layout: Layout, part: Parts, dtype: torch.dtype) -> torch.Tensor:
    """(…, outputs, inputs); computed in float32."""
    values, scales = part("values").float(), part("scales")
    number_type = scales.dtype
    if number_type == torch.uint8:
        scales = torch.exp2(scales.float() - _BIAS)
    *stack, outputs, inputs = values.shape
    blocks = scales.float().view(*stack, -(-outputs // layout.block_outputs), -(-inputs // layout.group))
    rows = blocks.repeat_interleave(layout.block_outputs, -2)[..., :outputs, :]
    for number in range(rows.shape[-1]):
        values[..., number * layout.group : (number + 1) * layout.group] *= rows[..., number : number + 1]
    return (values.to(number_type) if layout.rounded else values).to(dtype)


def read_mxfp4(part: Parts) -> Quantized:
    """(outputs, inputs) of one expert."""
    blocks = part("blocks")
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(1).view(torch.int8)
    # Half of the scale, since the table holds twice the numbers.
    exponents = part("scales").int() - (_BIAS + 1)
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)
    return Quantized(codes, scales, None, 4, lowest=0, table=MXFP4_TABLE)
