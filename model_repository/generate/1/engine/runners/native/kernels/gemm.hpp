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
#include "gemm_amx.hpp"
#include "gemv.hpp"
#include "rows.hpp"
#include "thread_pool.hpp"
#include "tile_cache.hpp"

// Rows of one work item at most: bounds its sums (24 KiB).
constexpr int kMaxRows = 192;

// Rows that are multiplied by one block of outputs at a time, at most: one stream of memory is read faster than two.
constexpr int kAloneRows = 2;

// Each pass goes over all inputs.
template <typename T>
void direct_passes(
    const Rows<T>& rows, int first, int count, const PackedWeights<T>& weights, int block, int blocks, RowSums* sums
) {
    const int last = block + blocks - 1;
    for_each_pass<kRowTile<T>, kRowsPerPass<T>>(first, count, [&](int m, auto number) {
        constexpr int kRows = decltype(number)::value;
        constexpr bool kFitsPair = kPassBlocks == 2 || 2 * kRows <= kAccumulators;
        if constexpr (kFitsPair)
            if (count > kAloneRows) return gemv_from_memory<kRows, 2>(rows, first + m, weights, {block, last}, sums + m, 0);
        if constexpr (!kFitsPair || kRows <= kAloneRows)
            for (int n = 0; n < blocks; n++) gemv_from_memory<kRows, 1>(rows, first + m, weights, {block + n}, sums + m, n);
    });
}

#ifdef TRITONLM_UNPACKS
// The same for packed weights.
inline void direct_passes_packed(
    const Rows<bf16>& rows, int first, int count, const PackedWeights<bf16>& weights, int block, int blocks, RowSums* sums
) {
    for_each_pass<kRowTile<bf16>, kRowsPerPass<bf16>>(first, count, [&](int m, auto number) {
        for (int n = 0; n < blocks; n++) packed_gemv<decltype(number)::value>(rows, first + m, weights, block + n, sums + m, n);
    });
}
#endif

#if defined(TRITONLM_UNPACKS) && !defined(__AVX512F__)
// For few registers: the blocks are unpacked, and then multiplied where they lie in the second-level cache. Unpacked lines and the
// sums of several rows do not fit the registers at once. Each pass prefetches its share of the packed blocks that follow.
inline void unpacked_passes(
    const Rows<bf16>& rows, int first, int count, const PackedWeights<bf16>& weights, int block, int blocks, RowSums* sums
) {
    thread_local AlignedVector<bf16> unpacked;
    const int inputs = rows.inputs();
    const size_t block_weights = (size_t)inputs * kVecSize;
    unpacked.resize(std::max(unpacked.size(), 2 * block_weights));
    const bf16* begin[2];
    const char* next[2];
    for (int n = 0; n < 2; n++) {
        bf16* const to = unpacked.data() + std::min(n, blocks - 1) * block_weights;
        PackedBlock packed(weights, inputs, block + std::min(n, blocks - 1));
        for (int k = 0; n < blocks && k < inputs; k += kTileInputs) packed.unpack(k, weights.upper_bytes, to + k * kVecSize);
        begin[n] = to;
        next[n] = reinterpret_cast<const char*>(packed.tile(2 * inputs));
    }
    const int passes = (first % kRowsPerPass<bf16> + count + kRowsPerPass<bf16> - 1) / kRowsPerPass<bf16>;
    const int steps = inputs / kLineInputs<bf16>, stride = (kPackedTileBytes / (kTileInputs / kLineInputs<bf16>) + passes - 1) / passes;
    for_each_pass<kRowTile<bf16>, kRowsPerPass<bf16>>(first, count, [&](int m, auto number) {
        constexpr int kRows = decltype(number)::value;
        if constexpr (2 * kRows <= kAccumulators)
            gemv<kRows, 2, bf16>(rows, first + m, begin, StreamPrefetch<2>{{next[0], next[1]}, stride}, sums + m, 0);
        else
            for (int n = 0; n < blocks; n++)
                gemv<kRows, 1, bf16>(rows, first + m, {begin[n]}, StreamPrefetch<1>{{next[n]}, stride}, sums + m, n);
        for (const char*& lines : next) lines += steps * stride;
    });
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
    const bool several = first % kRowTile<T> % kRowsPerPass<T> + count > kRowsPerPass<T>;
    // With few registers, products take longer than memory.
    if constexpr (kPassBlocks == 2)
        if (several) return ChunkedPasses<T>(rows, weights, block, blocks).run(first, count, sums, more);
#if defined(TRITONLM_UNPACKS) && !defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(bf16))
        if (several && weights.packed()) return unpacked_passes(rows, first, count, weights, block, blocks, sums);
#endif
#ifdef TRITONLM_UNPACKS
    if constexpr (sizeof(T) == sizeof(bf16))
        if (weights.packed()) return direct_passes_packed(rows, first, count, weights, block, blocks, sums);
#endif
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
