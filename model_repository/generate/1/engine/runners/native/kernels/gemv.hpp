// One pass of a matmul: 1 to 12 rows of a tile and one or two blocks of outputs, over all inputs, with the sums in registers.
// Few rows wait for weights to be read from memory. bf16_packed weights are unpacked into registers and multiplied at once.
//
// Layout: gemm.hpp's. Sums go to sums[row][block][16].
// ISA variants: those of fma.hpp and of LineUnpacker (bf16_packed.hpp). Tests: tests/inference/test_native.py and
// test_bf16_packed.py: all passes have one order of summation.
#pragma once

#include <cstddef>

#include "fma.hpp"
#include "tile_cache.hpp"

// Adds a tile of 32 inputs, whose weights lie at weights[block]; `rows` is the first row at the tile's first input.
template <typename Number, int kRows, int kBlocks>
TRITONLM_INLINE void accumulate_tile(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const Number* const (&weights)[kBlocks]
) {
    typedef typename StepOf<Number>::Type Step;
    constexpr int kLine = kRowLine<Number>;
    for (int line = 0; line < kTileInputs; line += kLine)
        for (int k = 0; k < kLine; k += Step::kInputs) {
            Step steps[kBlocks];
            for (int n = 0; n < kBlocks; n++) steps[n] = Step::load(weights[n] + (line + k) * kVecSize);
            sums.add(0, rows + line * tile + k, steps);
        }
}

#ifndef __AVX512BF16__
// The same for bfloat16 weights and rows in float32.
template <int kRows, int kBlocks>
TRITONLM_INLINE void accumulate_tile(
    Accumulators<float, kRows, kBlocks>& sums, const float* rows, int tile, const bf16* const (&weights)[kBlocks]
) {
    constexpr int kLine = kRowLine<float>;
    for (int line = 0; line < kTileInputs; line += kLine)
        for (int k = 0; k < kLine; k += 2) {
            Line lines[kBlocks];
            for (int n = 0; n < kBlocks; n++) lines[n] = load_line(weights[n] + (line + k) * kVecSize);
            sums.add(0, rows + line * tile + k, lines);
        }
}
#endif

#ifdef TRITONLM_UNPACKS
// Blocks that are unpacked before they are multiplied.
constexpr int kUnpackedBlocks = kAccumulators == 16 ? 2 : 1;

// Adds the tile of 32 inputs from input k on.
template <typename Number, int kRows, int kBlocks>
TRITONLM_INLINE void accumulate_packed_tile(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const LineUnpacker& unpacker,
    const PackedBlock (&packed)[kBlocks], int k
) {
    constexpr int kSome = kUnpackedBlocks < kBlocks ? kUnpackedBlocks : kBlocks;
    for (unsigned i = 0; i < kTileLines / 4; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
            for (int n = 0; n < kBlocks; n += kSome) {
                Line first[kSome], second[kSome];
                for (int j = 0; j < kSome; j++) unpacker.unpack(packed[n + j].tile(k), i, half, first[j], second[j]);
                const unsigned input = 8 * i + 4 * half, line = input / kRowLine<Number> * kRowLine<Number>;
                const Number* from = rows + line * tile + input % kRowLine<Number>;
                sums.add(n, from, first);
                sums.add(n, from + 2, second);
            }
}

template <typename Number, int kRows, int kBlocks>
TRITONLM_INLINE void accumulate_packed(
    Accumulators<Number, kRows, kBlocks>& sums, const Number* rows, int tile, const PackedWeights<bf16>& weights, int inputs,
    const int (&blocks)[kBlocks], bool from_memory
) {
    const LineUnpacker unpacker(weights.exponents);
    PackedBlock packed[kBlocks];
    for (int n = 0; n < kBlocks; n++) packed[n] = PackedBlock(weights, inputs, blocks[n]);
    for (int k = 0; k < inputs; k += kTileInputs) {
        bool has_outliers = false;
        for (int n = 0; n < kBlocks; n++) {
            has_outliers |= packed[n].has_outliers(k);
            if (from_memory) prefetch<kPackedTileBytes, 1>(packed[n].tile(k) + kPrefetchAhead);
        }
        if (__builtin_expect(has_outliers, 0)) {
            alignas(kCacheLine) bf16 tiles[kBlocks][kTileWeights];
            const bf16* from[kBlocks];
            for (int n = 0; n < kBlocks; n++) packed[n].unpack(k, weights.exponents, tiles[n]), from[n] = tiles[n];
            accumulate_tile(sums, rows + (size_t)k * tile, tile, from);
        } else accumulate_packed_tile(sums, rows + (size_t)k * tile, tile, unpacker, packed, k);
    }
}
#endif

// sums[i][to_block + n] = row first + i times block blocks[n].
template <int kRows, int kBlocks, typename T>
__attribute__((noinline)) void gemv(
    const Rows<T>& rows, int first, const PackedWeights<T>& weights, const int (&blocks)[kBlocks], bool from_memory,
    RowSums* to, int to_block
) {
    Accumulators<RowType<T>, kRows, kBlocks> sums;
    sums.clear();
    const int inputs = rows.inputs();
    const RowType<T>* numbers = rows.at(first);
    const int tile = rows.tile();
#ifdef TRITONLM_UNPACKS
    if constexpr (sizeof(T) == sizeof(bf16))
        if (weights.packed()) {
            accumulate_packed(sums, numbers, tile, weights, inputs, blocks, from_memory);
            return sums.save(to, to_block);
        }
#endif
    // The processor's own prefetching suffices where weights are all that is read.
    constexpr bool kPrefetches = sizeof(T) == sizeof(bf16) && kRows > 4;
    for (int k = 0; k < inputs; k += kTileInputs) {
        const T* tiles[kBlocks];
        for (int n = 0; n < kBlocks; n++) {
            tiles[n] = static_cast<const T*>(weights.values) + ((size_t)blocks[n] * inputs + k) * kVecSize;
            if (kPrefetches && from_memory) prefetch<kTileWeights * sizeof(T), 1>((const char*)tiles[n] + kPrefetchAhead);
        }
        accumulate_tile(sums, numbers + (size_t)k * tile, tile, tiles);
    }
    sums.save(to, to_block);
}
