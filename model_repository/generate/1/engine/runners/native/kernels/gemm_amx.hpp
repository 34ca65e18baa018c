// Passes of the GEMM (gemm.hpp) in AMX tiles: 16 or 32 rows of bfloat16 by one or two blocks of 16 outputs, also for a single row.
// Tiles wait for memory, because no later tile is loaded meanwhile: all that they read is prefetched.
//
// Layout: rows.hpp and gemm.hpp; a tile of 32 inputs is 1 KiB of rows, and 1 KiB of a block's weights.
// ISA variants: __AMX_BF16__, if amx_available(); otherwise this file is empty. Test: tests/inference/test_native.py.
#pragma once

#include <algorithm>
#include <cstddef>

#include "amx.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "tile_cache.hpp"

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

// The lines of weights that a pass prefetches: `bytes` of each of two blocks at each tile of inputs, into the second-level cache.
// From `turn` on they are those of the blocks that the thread reads next, `skipped` bytes further on.
struct WeightsAhead {
    const char *from = nullptr, *turn = nullptr;
    ptrdiff_t to_other = 0, skipped = 0;
    int bytes = 0;

    __attribute__((always_inline)) void operator()() {
        if (from == turn) from += skipped;
        for (int line = 0; line < bytes; line += kCacheLine) {
            __builtin_prefetch(from + line, 0, 2);
            __builtin_prefetch(from + to_other + line, 0, 2);
        }
        from += bytes;
    }
};

// 16 rows use four of the eight tile registers, 32 rows six. Measured beside a neighbour that also uses AMX on the core's
// other thread: eight registers take several times as long as alone, four take twice as long; alone, four are as fast.
template <bool kPair, bool kTwice>
void amx_accumulate(
    const Rows<bf16>& rows, int m, TileCache<bf16>& weights, int from, int to, RowSums* sums, WeightsAhead& ahead
) {
    constexpr int kRowTileBytes = kTileRows * kTileColumns * sizeof(bf16), kRowTilesAhead = 2;
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
        ahead();
        prefetch<kRowTileBytes, 1>((const char*)(row + row_tile) + kRowTilesAhead * kRowTileBytes);
        if (kTwice) prefetch<kRowTileBytes, 1>((const char*)(second_row + row_tile) + kRowTilesAhead * kRowTileBytes);
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

// At most 32 rows: one pass. More: a chunk of the inputs for all rows, then the next one, which is prefetched meanwhile.
template <bool kPair>
void amx_passes(const Rows<bf16>& rows, int first, int count, const PackedWeights<bf16>& packed, int block, RowSums* sums) {
    constexpr int kTilesAhead = 16;
    const int inputs = rows.inputs(), row_tiles = (count + kTileRows - 1) / kTileRows;
    const int tile_bytes = packed.packed() ? kPackedTileBytes : kTileWeights * sizeof(bf16);
    const bool single_pass = row_tiles <= 2;
    TileCache<bf16> weights(packed, inputs, block, 1 + kPair, single_pass);
    WeightsAhead ahead;
    const ptrdiff_t block_bytes = (ptrdiff_t)inputs / kTileInputs * tile_bytes, to_other = kPair * block_bytes;
    const char* const begin = static_cast<const char*>(packed.values) + block * block_bytes;
    // Packed weights of a single pass are prefetched while they are unpacked.
    if (single_pass && !packed.packed()) {
        const char* const end = begin + block_bytes;
        ahead = {std::min(begin + kTilesAhead * tile_bytes, end), end, to_other, to_other, tile_bytes};
    }
    for (int from = 0; from < inputs; from += weights.chunk_inputs()) {
        const int to = std::min(from + weights.chunk_inputs(), inputs);
        weights.begin_chunk(from, to);
        if (single_pass) {
            if (row_tiles == 2) amx_accumulate<kPair, true>(rows, first, weights, from, to, sums, ahead);
            else amx_accumulate<kPair, false>(rows, first, weights, from, to, sums, ahead);
            continue;
        }
        // After the last chunk those of the next blocks.
        const char* const next = begin + to / kTileInputs * tile_bytes + (to == inputs ? to_other : 0);
        ahead = {next, nullptr, to_other, 0, (tile_bytes + row_tiles - 1) / row_tiles};
        for (int m = 0; m < count; m += kTileRows)
            amx_accumulate<kPair, false>(rows, first + m, weights, from, to, sums + m, ahead);
    }
}
#endif
