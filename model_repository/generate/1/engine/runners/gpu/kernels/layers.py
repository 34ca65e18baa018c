"""Small operations between matmuls in one launch each, in triton-lang: RMSNorm, and SiLU times another half.

Each rounds where Hugging Face's code rounds. tests/inference/test_gpu_layers.py runs them in an interpreter on a CPU.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_stride"])
def rms_norm(
    rows, weights, output, row_stride, epsilon, width: tl.constexpr, padded: tl.constexpr, adds_one: tl.constexpr
):
    """output[r, n] = rows[r, n] / sqrt(mean(rows[r]²) + epsilon) · weight[n], or · (1 + weight[n]): grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, padded)
    stored = tl.load(rows + row * row_stride + n, mask=n < width, other=0.0)
    weight = tl.load(weights + n, mask=n < width, other=0.0)
    numbers = stored.to(tl.float32)
    numbers = numbers / tl.sqrt(tl.sum(numbers * numbers, 0) / width + epsilon)
    if adds_one:
        result = numbers * (1.0 + weight.to(tl.float32))
    else:
        result = numbers.to(stored.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(output + row * width + n, result, mask=n < width)


@triton.jit
def silu_multiply(both, output, width: tl.constexpr, block: tl.constexpr):
    """output[r, n] = silu(both[r, n]) · both[r, width + n]: grid (rows, parts of `block` numbers)."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    gate = tl.load(both + row * 2 * width + n, mask=n < width, other=0.0)
    up = tl.load(both + row * 2 * width + width + n, mask=n < width, other=0.0)
    number = gate.to(tl.float32)
    silu = (number / (1.0 + tl.exp(-number))).to(gate.dtype).to(tl.float32)
    tl.store(output + row * width + n, silu * up.to(tl.float32), mask=n < width)
