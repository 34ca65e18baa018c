"""The rotation of queries and keys (RoPE) and the write of keys and values to the KV cache, in triton-lang.

With n < rotary / 2 and m = n + rotary / 2, one program rotates one head of one token:

    rotated[n] = x[n] · cos[n] - x[m] · sin[n]
    rotated[m] = x[m] · cos[m] + x[n] · sin[m]

Numbers from `rotary` on stay. Products are rounded to the type of cos before they are summed, as Hugging Face's code
does. Queries go to a buffer; keys, and the values as they are, to the slot of their token in the cache.
tests/inference/test_gpu_rotary.py runs this on a CPU with the interpreter of triton-lang.
"""

import triton
import triton.language as tl


@triton.jit
def _product(number, factor):
    return (number.to(tl.float32) * factor.to(tl.float32)).to(factor.dtype).to(tl.float32)


@triton.jit
def rotate_and_write(
    query, keys, values, cos, sin, rotated, key_cache, value_cache, slots, query_row, query_head, key_row, key_head,
    value_row, value_head, cos_row, sin_row, cached_key_row, cached_value_row, heads: tl.constexpr, width: tl.constexpr,
    value_width: tl.constexpr, rotary: tl.constexpr, padded_half: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, query heads + KV heads). `rotated` is (tokens, query heads, width)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    source = query + token * query_row + head * query_head
    target = rotated + (token * heads + head) * width
    if head >= heads:
        source = keys + token * key_row + (head - heads) * key_head
        target = key_cache + slot * cached_key_row + (head - heads) * width
    half: tl.constexpr = rotary // 2
    n = tl.arange(0, padded_half)
    live = n < half
    low, high = tl.load(source + n, mask=live), tl.load(source + half + n, mask=live)
    cosines, sines = cos + token * cos_row + n, sin + token * sin_row + n
    first = _product(low, tl.load(cosines, mask=live)) - _product(high, tl.load(sines, mask=live))
    second = _product(high, tl.load(cosines + half, mask=live)) + _product(low, tl.load(sines + half, mask=live))
    tl.store(target + n, first, mask=live)
    tl.store(target + half + n, second, mask=live)
    part = tl.arange(0, padded)
    if rotary < width:
        stays = (part >= rotary) & (part < width)
        tl.store(target + part, tl.load(source + part, mask=stays), mask=stays)
    if head >= heads:
        value = tl.load(values + token * value_row + (head - heads) * value_head + part, mask=part < value_width)
        cell = value_cache + slot * cached_value_row + (head - heads) * value_width
        tl.store(cell + part, value, mask=part < value_width)
