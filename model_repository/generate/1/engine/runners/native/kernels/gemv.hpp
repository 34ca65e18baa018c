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
// Blocks that are unpacked before they are multiplied.
constexpr int kUnpackedBlocks = kAccumulators == 16 ? 2 : 1;

// Adds the tile of 32 inputs from input k on. With kKeep its weights are stored at kept[block].
template <bool kKeep, typename Number, int kRows, int kBlocks, typename Ahead>
TRITONLM_INLINE void accumulate_packed_tile(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const LineUnpacker& unpacker,
    const PackedBlock (&packed)[kBlocks], int k, bf16* const (&kept)[kBlocks], Ahead& ahead
) {
    constexpr int kSome = kUnpackedBlocks < kBlocks ? kUnpackedBlocks : kBlocks;
    for (unsigned i = 0; i < kTileLines / 4; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
            for (int n = 0; n < kBlocks; n += kSome) {
                Line first[kSome], second[kSome];
                for (int j = 0; j < kSome; j++) {
                    unpacker.unpack(packed[n + j].tile(k), i, half, first[j], second[j]);
                    if (!kKeep) continue;
                    bf16* const to = kept[n + j] + (4 * i + 2 * half) * kLineWeights;
                    memcpy(to, &first[j], sizeof(Line));
                    memcpy(to + kLineWeights, &second[j], sizeof(Line));
                }
                const unsigned input = 8 * i + 4 * half, line = input / kRowLine<Number> * kRowLine<Number>;
                const Number* from = rows + line * tile + input % kRowLine<Number>;
                if (n == 0) ahead(), ahead();
                sums.add(n, from, first);
                sums.add(n, from + 2, second);
            }
}

// Adds the inputs [from, to). With kKeep their weights are stored at kept[block].
template <bool kKeep, typename Number, int kRows, int kBlocks, typename Ahead>
TRITONLM_INLINE void accumulate_packed(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const ExponentTable& exponents,
    PackedBlock (&packed)[kBlocks], int from, int to, bf16* const (&kept)[kBlocks], Ahead& ahead
) {
    const LineUnpacker unpacker(exponents);
    alignas(kCacheLine) bf16 tiles[kBlocks][kKeep ? 1 : kTileWeights];
    for (int k = from; k < to; k += kTileInputs, rows += kTileInputs * tile) {
        ahead.begin_tile(k);
        bool has_outliers = false;
        bf16* unpacked[kBlocks];
        for (int n = 0; n < kBlocks; n++) {
            has_outliers |= packed[n].has_outliers(k);
            unpacked[n] = kKeep ? kept[n] + (k - from) * kVecSize : tiles[n];
        }
        if (__builtin_expect(has_outliers, 0)) {
            const bf16* weights[kBlocks];
            for (int n = 0; n < kBlocks; n++) packed[n].unpack(k, exponents, unpacked[n]), weights[n] = unpacked[n];
            accumulate_tile(sums, rows, tile, weights, ahead);
        } else accumulate_packed_tile<kKeep>(sums, rows, tile, unpacker, packed, k, unpacked, ahead);
    }
}
#endif

// A pass that reads weights from memory prefetches this many bytes ahead in each block of outputs: whole tiles.
constexpr int kPassAhead = 8192, kPackedPassAhead = 12288;

// For a pass over one or two blocks of outputs, whose weights begin at blocks[n]: a line of `bytes` in each at every step, and
// from input `turn` on a line of the next blocks.
template <int kBlocks>
BlockPrefetch<kBlocks> prefetch_blocks(const char* const (&blocks)[kBlocks], int bytes, int ahead, int turn) {
    const char* const from = blocks[0] + ahead;
    if (kBlocks == 1) return {{from, from + bytes, 2 * bytes}, -1, 0};
    const size_t block_bytes = blocks[kBlocks - 1] - blocks[0];
    return {{from, blocks[kBlocks - 1] + ahead, bytes}, turn, block_bytes};
}

// sums[i][to_block + n] = row first + i times block blocks[n].
template <int kRows, int kBlocks, typename T>
__attribute__((noinline)) void gemv(
    const Rows<T>& rows, int first, const PackedWeights<T>& weights, const int (&blocks)[kBlocks], RowSums* to, int to_block
) {
    Accumulators<RowType<T>, kRows, kBlocks> sums;
    sums.clear();
    const int inputs = rows.inputs(), tile = rows.tile();
    const RowType<T>* numbers = rows.at(first);
    const char* begin[kBlocks];
#ifdef TRITONLM_UNPACKS
    if constexpr (sizeof(T) == sizeof(bf16))
        if (weights.packed()) {
            PackedBlock packed[kBlocks];
            bf16* const kept[kBlocks] = {};
            for (int n = 0; n < kBlocks; n++) {
                packed[n] = PackedBlock(weights, inputs, blocks[n]);
                begin[n] = (const char*)packed[n].tile(0);
            }
            const int turn = inputs - kPackedPassAhead / kPackedLineBytes * kLineInputs<T>;
            auto ahead = prefetch_blocks(begin, kPackedLineBytes, kPackedPassAhead, turn);
            accumulate_packed<false>(sums, numbers, tile, weights.exponents, packed, 0, inputs, kept, ahead);
            return sums.save(to, to_block);
        }
#endif
    for (int n = 0; n < kBlocks; n++) begin[n] = reinterpret_cast<const char*>(weights.block(blocks[n], inputs));
    [[maybe_unused]] const int turn = inputs - kPassAhead / (int)kCacheLine * kLineInputs<T>;
    // For few rows of float32 the processor's own prefetching is faster.
    constexpr bool kPrefetches = sizeof(T) == sizeof(bf16) || kRows > 4;
    std::conditional_t<kPrefetches, BlockPrefetch<kBlocks>, NoPrefetch> ahead;
    if constexpr (kPrefetches) ahead = prefetch_blocks(begin, kCacheLine, kPassAhead, turn);
    for (int k = 0; k < inputs; k += kTileInputs) {
        ahead.begin_tile(k);
        const T* tiles[kBlocks];
        for (int n = 0; n < kBlocks; n++) tiles[n] = reinterpret_cast<const T*>(begin[n]) + (size_t)k * kVecSize;
        accumulate_tile(sums, numbers + (size_t)k * tile, tile, tiles, ahead);
    }
    sums.save(to, to_block);
}
