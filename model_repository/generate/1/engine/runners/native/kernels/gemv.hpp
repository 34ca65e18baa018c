// One pass of a matmul: 1 to 12 rows of a tile and one or two blocks of outputs, over all inputs, with the sums in registers.
// Few rows wait for weights to be read from memory. bf16_packed weights are unpacked into registers and multiplied at once.
//
// Layout: gemm.hpp's. Sums go to sums[row][block][16].
// ISA variants: those of fma.hpp and of LineUnpacker (bf16_packed.hpp). Tests: tests/inference/test_native.py and
// test_bf16_packed.py: all passes have one order of summation.
#pragma once

#include <cstddef>
#include <type_traits>

#include "fma.hpp"
#include "prefetch.hpp"
#include "tile_cache.hpp"

// Adds a tile of 32 inputs, whose weights lie at weights[block]; `rows` is the first row at the tile's first input. Each step
// calls `ahead()`.
template <typename Number, int kRows, int kBlocks, typename Ahead>
TRITONLM_INLINE void accumulate_tile(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const Number* const (&weights)[kBlocks],
    Ahead& ahead
) {
    typedef typename StepOf<Number>::Type Step;
    constexpr int kLine = kRowLine<Number>;
    for (int line = 0; line < kTileInputs; line += kLine)
        for (int k = 0; k < kLine; k += Step::kInputs) {
            Step steps[kBlocks];
            for (int n = 0; n < kBlocks; n++) steps[n] = Step::load(weights[n] + (line + k) * kVecSize);
            ahead();
            sums.add(0, rows + line * tile + k, steps);
        }
}

#ifndef __AVX512BF16__
// The same for bfloat16 weights and rows in float32.
template <int kRows, int kBlocks, typename Ahead>
TRITONLM_INLINE void accumulate_tile(
    Accumulators<float, kRows, kBlocks>& sums, const float* rows, int tile, const bf16* const (&weights)[kBlocks], Ahead& ahead
) {
    // With few registers one block's lines at a time, or sums would be in memory.
    constexpr int kLine = kRowLine<float>, kSome = kAccumulators < 16 ? 1 : kBlocks;
    for (int line = 0; line < kTileInputs; line += kLine)
        for (int k = 0; k < kLine; k += 2) {
            ahead();
#pragma GCC unroll 2
            for (int n = 0; n < kBlocks; n += kSome) {
                Line lines[kSome];
                for (int i = 0; i < kSome; i++) lines[i] = load_line(weights[n + i] + (line + k) * kVecSize);
                sums.add(n, rows + line * tile + k, lines);
            }
        }
}
#endif

#ifdef TRITONLM_UNPACKS
// Adds packed tiles of 32 inputs. With kKeep their weights are stored at kept[block]. Each half of a part calls `ahead(part, half)`.
template <bool kKeep, bool kHasOutliers, typename Number, int kRows, int kBlocks, typename Ahead>
TRITONLM_INLINE void accumulate_packed_tile(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const LineUnpacker& unpacker,
    const uint8_t* const (&packed)[kBlocks], const TileOutliers (&outliers)[kBlocks], bf16* const (&kept)[kBlocks], Ahead& ahead
) {
    for (unsigned i = 0; i < kTileParts; i++)
#pragma GCC unroll 2
        for (unsigned half = 0; half < 2; half++) {
            const unsigned number = 4 * i + 2 * half, input = 2 * number;
            Line first[kBlocks], second[kBlocks];
            for (int n = 0; n < kBlocks; n++) {
                unpacker.unpack(packed[n] + i * kPartBytes, half, first[n], second[n]);
                if (kHasOutliers) outliers[n].insert(number, first[n]), outliers[n].insert(number + 1, second[n]);
                if (!kKeep) continue;
                store_line(kept[n] + number * kLineWeights, first[n]);
                store_line(kept[n] + (number + 1) * kLineWeights, second[n]);
            }
            const Number* from = rows + input / kRowLine<Number> * kRowLine<Number> * tile + input % kRowLine<Number>;
            ahead(packed[0] + i * kPartBytes, half);
            sums.add(0, from, first);
            sums.add(0, from + 2, second);
        }
}

// Adds the inputs [from, to). With kKeep their weights are stored at kept[block].
template <bool kKeep, typename Number, int kRows, int kBlocks, typename Ahead>
TRITONLM_INLINE void accumulate_packed(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const UpperBytes& upper_bytes, PackedBlock* blocks,
    int from, int to, bf16* const (&kept)[kBlocks], Ahead& ahead
) {
    const LineUnpacker unpacker(upper_bytes);
    TileOutliers outliers[kBlocks];
    for (int k = from; k < to; k += kTileInputs, rows += kTileInputs * tile) {
        bool has_outliers = false;
        const uint8_t* packed[kBlocks];
        bf16* stored[kBlocks];
        for (int n = 0; n < kBlocks; n++) {
            has_outliers |= blocks[n].has_outliers(k);
            packed[n] = blocks[n].tile(k);
            stored[n] = kKeep ? kept[n] + (k - from) * kVecSize : nullptr;
        }
        if (__builtin_expect(has_outliers, 0)) {
            for (int n = 0; n < kBlocks; n++) blocks[n].take_outliers(k, outliers[n]);
            accumulate_packed_tile<kKeep, true>(sums, rows, tile, unpacker, packed, outliers, stored, ahead);
            for (int n = 0; n < kBlocks; n++) outliers[n].clear();
        } else accumulate_packed_tile<kKeep, false>(sums, rows, tile, unpacker, packed, outliers, stored, ahead);
    }
}
#endif

// A pass that reads weights from memory prefetches this many bytes ahead in each block of outputs: whole tiles.
constexpr int kPassAhead = 8192, kPackedPassAhead = 6144;
// Rows, at most, for which the processor's own prefetching of weights that are not packed is faster.
template <typename T>
constexpr int kUnaidedRows = kAccumulators == 16 || sizeof(T) == sizeof(float) ? 4 : 2;

// For a pass over one or two blocks of outputs, whose weights begin at blocks[n]: a line in each at every step, and from input `turn`
// on a line of the next blocks.
template <int kBlocks, typename T>
BlockPrefetch<kBlocks> prefetch_blocks(const T* const (&blocks)[kBlocks], int turn) {
    constexpr int kLine = kCacheLine;
    const char* const from = reinterpret_cast<const char*>(blocks[0]) + kPassAhead;
    if (kBlocks == 1) return {{from, from + kLine, 2 * kLine}, -1, 0};
    const size_t block_bytes = (blocks[kBlocks - 1] - blocks[0]) * sizeof(T);
    return {{from, from + block_bytes, kLine}, turn, block_bytes};
}

// sums[i][to_block + n] = row first + i times a block of weights that are not packed and begin at weights[n].
template <int kRows, int kBlocks, typename T, typename Ahead>
__attribute__((noinline)) void gemv(
    const Rows<T>& rows, int first, const T* const (&weights)[kBlocks], Ahead ahead, RowSums* to, int to_block
) {
    Accumulators<RowType<T>, kRows, kBlocks> sums;
    sums.clear();
    const int inputs = rows.inputs(), tile = rows.tile();
    const RowType<T>* numbers = rows.at(first);
    for (int k = 0; k < inputs; k += kTileInputs) {
        ahead.begin_tile(k);
        const T* tiles[kBlocks];
        for (int n = 0; n < kBlocks; n++) tiles[n] = weights[n] + (size_t)k * kVecSize;
        accumulate_tile(sums, numbers + (size_t)k * tile, tile, tiles, ahead);
    }
    sums.save(to, to_block);
}

// The same for blocks that lie in memory.
template <int kRows, int kBlocks, typename T>
void gemv_from_memory(
    const Rows<T>& rows, int first, const PackedWeights<T>& weights, const int (&blocks)[kBlocks], RowSums* to, int to_block
) {
    const int inputs = rows.inputs();
    const T* from[kBlocks];
    for (int n = 0; n < kBlocks; n++) from[n] = weights.block(blocks[n], inputs);
    if constexpr (kRows > kUnaidedRows<T>) {
        const int turn = inputs - kPassAhead / (int)kCacheLine * kLineInputs<T>;
        gemv<kRows, kBlocks, T>(rows, first, from, prefetch_blocks<kBlocks, T>(from, turn), to, to_block);
    } else gemv<kRows, kBlocks, T>(rows, first, from, NoPrefetch(), to, to_block);
}

#ifdef TRITONLM_UNPACKS
// Prefetches a part's three lines.
struct PartAhead {
    static_assert(kPartBytes == 3 * kCacheLine);
    __attribute__((always_inline)) void operator()(const uint8_t* part, int half) const {
        if (half == 0) prefetch<2 * kCacheLine, 2>(part + kPackedPassAhead);
        else prefetch<kCacheLine, 2>(part + kPackedPassAhead + 2 * kCacheLine);
    }
};

// The same for a block of packed weights. Blocks are read one after the other: one stream of memory is faster than two.
template <int kRows>
__attribute__((noinline)) void packed_gemv(
    const Rows<bf16>& rows, int first, const PackedWeights<bf16>& weights, int block, RowSums* to, int to_block
) {
    Accumulators<RowType<bf16>, kRows, 1> sums;
    sums.clear();
    PackedBlock packed(weights, rows.inputs(), block);
    const PartAhead ahead;
    accumulate_packed<false>(sums, rows.at(first), rows.tile(), weights.upper_bytes, &packed, 0, rows.inputs(), {nullptr}, ahead);
    sums.save(to, to_block);
}
#endif
