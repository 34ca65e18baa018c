"""Attention over the blocks of the KV cache where they lie, and the write of new keys and values, in triton-lang.

One program of `attend` computes one KV head of one tile (consecutive query rows of one sequence), with an online
softmax over runs of `block_n` keys:

    scores[m, n] = softcap(scale · q[m] · k[n])     where 0 <= position[m] - n < window
    output[m]    = Σ_n exp(scores[m, n] - best[m]) v[n] / Σ_n exp(scores[m, n] - best[m])

The query heads of one KV head (GQA) are further rows of the tile: m = query · repeats + head. Key n of a sequence lies
in slot table[n // block_tokens] · block_tokens + n % block_tokens. With `splits` > 1 a tile's keys are divided between
as many programs, and `combine` adds up their parts: otherwise one long context would keep one multiprocessor busy and
leave the others idle. tests/inference/test_gpu_kernels.py runs this on a CPU with the interpreter of triton-lang.
"""

import triton
import triton.language as tl

# triton-lang compiles a kernel again where a number is 1 or a multiple of 16, and where a pointer is aligned. These
# change from step to step, and a step must not wait for a compiler.
_VARYING_NUMBERS = ["rows", "table_row", "window"]
_VARYING_POINTERS = ["tables", "tile_rows", "tile_counts", "tile_starts", "tile_sequences"]


@triton.jit
def write(
    keys, values, key_cache, value_cache, slots, key_row, key_head, value_row, value_head, cached_key_row,
    cached_value_row, width: tl.constexpr, value_width: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Copy the keys and values of one token and KV head to its slot: grid (tokens, KV heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    part = tl.arange(0, padded)
    key = tl.load(keys + token * key_row + head * key_head + part, mask=part < width)
    tl.store(key_cache + slot * cached_key_row + head * width + part, key, mask=part < width)
    value = tl.load(values + token * value_row + head * value_head + part, mask=part < value_width)
    tl.store(value_cache + slot * cached_value_row + head * value_width + part, value, mask=part < value_width)


@triton.jit(do_not_specialize=_VARYING_NUMBERS, do_not_specialize_on_alignment=_VARYING_POINTERS)
def attend(  # noqa: PLR0915 (one loop, whose state is in registers)
    query, key_cache, value_cache, output, parts, bests, totals, tables, tile_rows, tile_counts, tile_starts,
    tile_sequences, rows, heads, query_row, query_head, cached_key_row, cached_value_row, table_row, scale, softcap,
    window, block_tokens: tl.constexpr, repeats: tl.constexpr, width: tl.constexpr, value_width: tl.constexpr,
    padded: tl.constexpr, padded_value: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    splits: tl.constexpr, has_window: tl.constexpr, has_softcap: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, splits). `output` is (rows, heads, value_width), `parts` the same for each split."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count, start = tl.load(tile_counts + tile), tl.load(tile_starts + tile)
    table = tables + tl.load(tile_sequences + tile).to(tl.int64) * table_row
    member = tl.arange(0, block_m)
    position = start + member // repeats
    row = (tl.load(tile_rows + tile) + member // repeats).to(tl.int64)
    head = kv_head * repeats + member % repeats
    live = member // repeats < count
    part, value_part = tl.arange(0, padded), tl.arange(0, padded_value)
    q = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + part[None, :],
        mask=live[:, None] & (part < width)[None, :],
        other=0.0,
    )
    end = start + count
    first = 0
    if has_window:
        first = tl.maximum(start - window + 1, 0) // block_n * block_n
    if splits > 1:
        share = tl.cdiv(tl.cdiv(end - first, splits), block_n) * block_n
        first += split * share
        end = tl.minimum(end, first + share)
    best = tl.full((block_m,), float("-inf"), tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    sums = tl.zeros((block_m, padded_value), tl.float32)
    for begin in range(first, end, block_n):
        n = begin + tl.arange(0, block_n)
        block = tl.load(table + n // block_tokens, mask=n < end, other=0)
        slot = block.to(tl.int64) * block_tokens + n % block_tokens
        k = tl.load(
            key_cache + slot[None, :] * cached_key_row + kv_head * width + part[:, None],
            mask=(n < end)[None, :] & (part < width)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if has_softcap:
            # tanh(x) = 1 - 2 / (exp(2x) + 1)
            scores = softcap - 2.0 * softcap / (tl.exp(scores * (2.0 / softcap)) + 1.0)
        allowed = (n < end)[None, :] & (n[None, :] <= position[:, None])
        if has_window:
            allowed = allowed & (n[None, :] > position[:, None] - window)
        scores = tl.where(allowed, scores, float("-inf"))
        larger = tl.maximum(best, tl.max(scores, 1))
        # A row without an allowed key so far.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(best - base)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(
            value_cache + slot[:, None] * cached_value_row + kv_head * value_width + value_part[None, :],
            mask=(n < end)[:, None] & (value_part < value_width)[None, :],
            other=0.0,
        )
        sums = sums * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = larger
    cell = row * heads + head
    stored = live[:, None] & (value_part < value_width)[None, :]
    if splits == 1:
        # Rows beyond the tile have no keys, and are not stored.
        result = sums / tl.where(live, total, 1.0)[:, None]
        tl.store(output + cell[:, None] * value_width + value_part[None, :], result, mask=stored)
    else:
        cell += split.to(tl.int64) * rows * heads
        tl.store(parts + cell[:, None] * value_width + value_part[None, :], sums, mask=stored)
        tl.store(bests + cell, best, mask=live)
        tl.store(totals + cell, total, mask=live)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["tile_rows", "tile_counts"])
def combine(
    output, parts, bests, totals, tile_rows, tile_counts, rows, heads, value_width: tl.constexpr,
    padded_value: tl.constexpr, splits: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one row and head: grid (tiles · height, heads). A part without keys has total = 0."""
    tile, member, head = tl.program_id(0) // height, tl.program_id(0) % height, tl.program_id(1)
    if member < tl.load(tile_counts + tile):
        cell = (tl.load(tile_rows + tile) + member).to(tl.int64) * heads + head
        split, part = tl.arange(0, splits), tl.arange(0, padded_value)
        cells = cell + split.to(tl.int64) * rows * heads
        best = tl.load(bests + cells)
        weight = tl.exp(best - tl.max(best, 0))
        total = tl.sum(weight * tl.load(totals + cells), 0)
        sums = tl.load(
            parts + cells[:, None] * value_width + part[None, :], mask=(part < value_width)[None, :], other=0.0
        )
        result = tl.sum(weight[:, None] * sums, 0) / total
        tl.store(output + cell * value_width + part, result, mask=part < value_width)
