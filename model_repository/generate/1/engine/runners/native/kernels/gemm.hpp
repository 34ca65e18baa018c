// GEMM: y[r][o] = sum over k of x[r][k] * w[o][k], x in Rows<T>, w packed, sums in float32. A result is summed over k in one
// order, whatever the number of rows: a row's result is the same bits alone and in a batch.
//
// Layout of w: blocks of 16 outputs, [outputs / 16][inputs / s][16][s], s = 1 in float32 and 2 in bfloat16:
//   w[o][k] at ((o / 16) * inputs / s + k / s) * 16 s + (o % 16) * s + k % s
// as AMX and AVX512-BF16 read bfloat16. bf16_packed.hpp compresses its tiles.
// ISA variants: __AMX_BF16__ (and amx_available() at run time) multiplies tiles of 16 x 32; otherwise those of fma.hpp.
// Test: tests/inference/test_native.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "amx.hpp"
#include "chunked_gemm.hpp"
#include "gemv.hpp"
#include "rows.hpp"
#include "thread_pool.hpp"
#include "tile_cache.hpp"

// Rows of one work item at most: bounds its sums (24 KiB).
constexpr int kMaxRows = 192;

#ifdef __AMX_BF16__
// Tiles 0 and 1 accumulate 16 rows: of one block of outputs, and of a second one. Their rows are `stride` bytes apart.
template <bool kPair, typename Number>
void store_accumulators(Number* to, Number* second, int stride) {
    _tile_stored(0, to, stride);
    if (kPair) _tile_stored(1, second, stride);
    compiler_fence();
}

// Tiles 4 and 5 accumulate another 16 rows.
inline void zero_second_accumulators() {
    _tile_zero(4);
    _tile_zero(5);
}

// 16 rows use four of the eight tile registers, 32 rows six. Measured beside a neighbour that also uses AMX on the core's
// other thread: eight registers take several times as long as alone, four take twice as long; alone, four are as fast.
template <bool kPair, bool kTwice>
void amx_accumulate(const Rows<bf16>& rows, int m, TileCache<bf16>& weights, int from, int to, RowSums* sums) {
    const bf16 *row = rows.at(m, from), *second_row = rows.at(m + kTileRows * kTwice, from);
    const bf16 *block = weights.block(0), *second_block = weights.block(kPair);
    constexpr int kStride = sizeof(RowSums);
    zero_accumulators();
    if (from) {
        _tile_loadd(0, sums[0][0], kStride);
        if (kPair) _tile_loadd(1, sums[0][1], kStride);
    }
    if (kTwice) zero_second_accumulators();
    for (int k = from, ready = from; k < to; k += kTileInputs) {
        if (k == ready) ready = weights.prepare(k);
        const size_t tile = weights.offset(k), row_tile = (size_t)(k - from) * kTileRows;
        compiler_fence();
        _tile_loadd(2, row + row_tile, 64);
        _tile_loadd(3, block + tile, 64);
        _tile_dpbf16ps(0, 2, 3);
        if (kPair) {
            _tile_loadd(3, second_block + tile, 64);
            _tile_dpbf16ps(1, 2, 3);
        }
        if (!kTwice) continue;
        _tile_loadd(2, second_row + row_tile, 64);
        if (kPair) {
            _tile_dpbf16ps(5, 2, 3);
            _tile_loadd(3, block + tile, 64);
        }
        _tile_dpbf16ps(4, 2, 3);
    }
    store_accumulators<kPair>(sums[0][0], sums[0][1], kStride);
    if (!kTwice) return;
    _tile_stored(4, sums[kTileRows][0], kStride);
    if (kPair) _tile_stored(5, sums[kTileRows][1], kStride);
    compiler_fence();
}
#endif

// Each pass goes over all inputs.
template <typename T>
void direct_passes(
    const Rows<T>& rows, int first, int count, const PackedWeights<T>& weights, int block, int blocks, RowSums* sums
) {
    const int last = block + blocks - 1;
    for_each_pass<kRowTile<T>, kRowsPerPass<T>>(first, count, [&](int m, auto number) {
        constexpr int kRows = decltype(number)::value;
        if constexpr (2 * kRows <= kAccumulators || kPassBlocks == 2)
            gemv<kRows, 2>(rows, first + m, weights, {block, last}, sums + m, 0);
        else
            for (int n = 0; n < blocks; n++) gemv<kRows, 1>(rows, first + m, weights, {block + n}, sums + m, n);
    });
}

#ifdef __AMX_BF16__
// At most 32 rows: one pass. More: a chunk of the inputs for all rows, then the next one.
template <bool kPair>
void amx_passes(const Rows<bf16>& rows, int first, int count, const PackedWeights<bf16>& packed, int block, RowSums* sums) {
    const bool single_pass = count <= 2 * kTileRows;
    TileCache<bf16> weights(packed, rows.inputs(), block, 1 + kPair, single_pass);
    for (int from = 0; from < rows.inputs(); from += weights.chunk_inputs()) {
        const int to = std::min(from + weights.chunk_inputs(), rows.inputs());
        weights.begin_chunk(from, to);
        if (single_pass && count > kTileRows) amx_accumulate<kPair, true>(rows, first, weights, from, to, sums);
        else
            for (int m = 0; m < count; m += kTileRows)
                amx_accumulate<kPair, false>(rows, first + m, weights, from, to, sums + m);
    }
}
#endif

// sums[i][n] = row first + i times block + n, for one or two blocks.
template <typename T>
__attribute__((noinline)) void multiply_blocks(
    const Rows<T>& rows, int first, int count, const PackedWeights<T>& weights, int block, int blocks, RowSums* sums,
    PrefetchList* more
) {
#ifdef __AMX_BF16__
    if constexpr (sizeof(T) == sizeof(bf16)) {
        if (amx_available() && blocks == 2) return amx_passes<true>(rows, first, count, weights, block, sums);
        if (amx_available()) return amx_passes<false>(rows, first, count, weights, block, sums);
    }
#endif
    // With few registers, products take longer than memory, and a chunk pays only where it saves unpacking.
    constexpr int kDirectRows = kPassBlocks == 2 ? kRowsPerPass<T> : 2 * kRowsPerPass<T>;
    const bool chunked = kPassBlocks == 2 || weights.packed();
    if (chunked && first % kRowTile<T> % kRowsPerPass<T> + count > kDirectRows)
        return ChunkedPasses<T>(rows, weights, block, blocks).run(first, count, sums, more);
    direct_passes(rows, first, count, weights, block, blocks, sums);
}

// Rows that stay in the second-level cache while the weights pass, 1 MiB of them: whole tiles of 6, 12 or 16 rows, at most
// `limit`.
template <typename T>
int rows_per_item(int inputs, int limit) {
    constexpr size_t kBytes = 1 << 20, kWholeTiles = 48;
    const size_t fitting = kBytes / (inputs * sizeof(T)) / kWholeTiles * kWholeTiles;
    return std::clamp<size_t>(fitting, kWholeTiles, limit);
}

// Work items of `rows_per_item` rows and two blocks of outputs: `task(first row, row count, first block, whether there is a
// second block, claim)`.
template <typename Task>
void for_each_block_pair(int count, int rows_per_item, int blocks, WorkQueue& queue, Task task) {
    const int pairs = (blocks + 1) / 2, row_items = (count + rows_per_item - 1) / rows_per_item;
    queue.for_each_redundant(row_items * pairs, [&](int i, Claim& claim) {
        const int first = i / pairs * rows_per_item, block = i % pairs * 2;
        task(first, std::min(rows_per_item, count - first), block, block + 1 < blocks, claim);
    });
}
