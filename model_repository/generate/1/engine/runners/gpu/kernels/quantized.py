"""Matmuls with weights of 4 or 8 bits and a scale for each group of inputs, in triton-lang.

    output[m, n] = Σ_k numbers[m, k] · code[n, k] · scale[k // group, n] + bias[n]

Codes of 8 bits are whole numbers, or with `floats` numbers in e4m3. A weight is dequantized in registers, to the number
type of `numbers`, so memory is read for codes and scales alone. 4-bit codes lie two in a byte: byte j of a run of
`step` inputs holds those of inputs j (low bits) and step / 2 + j, each plus 8.

tests/inference/test_gpu_quantized.py runs this in an interpreter on a CPU.
"""

import triton
import triton.language as tl


@triton.jit
def _part(numbers, row_stride, m, rows, k, inputs, codes, scales, n, outputs, group: tl.constexpr):
    """The products of these inputs, with their codes (inputs, outputs) as numbers."""
    x = tl.load(
        numbers + m[:, None] * row_stride + k[None, :],
        mask=(m < rows)[:, None] & (k < inputs)[None, :],
        other=0.0,
    )
    scale = tl.load(scales + (k // group)[:, None] * outputs + n[None, :], mask=(n < outputs)[None, :], other=0.0)
    weights = codes.to(tl.float32) * scale.to(tl.float32)
    return tl.dot(x, weights.to(x.dtype), input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def multiply(
    numbers, codes, scales, bias, output, rows, outputs, row_stride, inputs: tl.constexpr, padded: tl.constexpr,
    group: tl.constexpr, bits: tl.constexpr, step: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    has_bias: tl.constexpr, floats: tl.constexpr,
):  # fmt: skip
    """Grid (outputs / block_n, rows / block_m). `padded` inputs have codes: whole runs of `step`."""
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    wide_m, wide_n = m.to(tl.int64), n.to(tl.int64)
    total = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, padded, step):
        if bits == 4:
            part = tl.arange(0, step // 2)
            places = wide_n[None, :] * (padded // 2) + start // 2 + part[:, None]
            pair = tl.load(codes + places, mask=(n < outputs)[None, :], other=0).to(tl.int32)
            k = start + part
            total += _part(numbers, row_stride, wide_m, rows, k, inputs, (pair & 15) - 8, scales, n, outputs, group)
            k += step // 2
            total += _part(numbers, row_stride, wide_m, rows, k, inputs, (pair >> 4) - 8, scales, n, outputs, group)
        else:
            k = start + tl.arange(0, step)
            code = tl.load(codes + wide_n[None, :] * padded + k[:, None], mask=(n < outputs)[None, :], other=0)
            if floats:
                code = code.to(tl.float8e4nv, bitcast=True)
            total += _part(numbers, row_stride, wide_m, rows, k, inputs, code, scales, n, outputs, group)
    if has_bias:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(output + wide_m[:, None] * outputs + n[None, :], total, mask=(m < rows)[:, None] & (n < outputs)[None, :])
