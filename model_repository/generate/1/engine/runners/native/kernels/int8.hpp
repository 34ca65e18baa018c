// int8 GEMM: y[r][o] = scale[o] * sum over groups g of (scale[r][g] * sum over k in g of xq[r][k] * wq[o][k]).
// Weights have a scale for each output (weights.py); rows are quantized just before the matmul, with a scale for each group
// of 256 inputs: scale = max |x| / 127, xq = round(x / scale). The inner sums are exact integers, equal in any order and on
// any machine; the outer sums are float32 in the order of the groups.
//
// Layout: wq [outputs / 16][inputs / 4][16][4], with inputs padded by zeros to a multiple of 64:
//   wq[o][k] at ((o / 16) * padded / 4 + k / 4) * 64 + (o % 16) * 4 + k % 4
// xq: int8_rows.hpp.
// ISA variants: __AMX_INT8__ (and amx_available() at run time) multiplies tiles; __AVX512VNNI__ uses vpdpbusd; __AVX512BW__
// and __AVX2__ use vpmaddubsw; otherwise compiler vectors. Test: tests/inference/test_int8.py.
#pragma once

#include <algorithm>
#include <climits>
#include <cstddef>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "amx.hpp"
#include "gemm.hpp"
#include "int8_rows.hpp"
#include "simd.hpp"
#include "thread_pool.hpp"

// Rows of one work item at most: bounds the totals on the stack (60 KiB). Groups of two blocks of weights that stay in the
// first-level cache while rows pass: 3 * 256 inputs * 32 outputs = 24 KiB.
constexpr int kMaxInt8Rows = 480, kCachedGroups = 3;
// Rows of one pass, at most.
constexpr int kInt8PassRows = kAccumulators == 16 ? 8 : 6;

// One step of the sum: the weights of 16 outputs for four inputs, and add(total, &xq[r][k]). The sums are of
// (weight + kWeightOffset) * xq.
#ifdef __AVX512VNNI__
struct Int8Dot {
    // vpdpbusd multiplies unsigned by signed bytes. Flipping the sign bit adds 128 to a weight.
    static constexpr int kWeightOffset = 128;
    __m512i weights;
    explicit Int8Dot(const int8_t* from) : weights(_mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128))) {}
    void add(Reg16i& total, const int8_t* row) const {
        int32_t four;
        memcpy(&four, row, sizeof four);
        total = (Vec16i)_mm512_dpbusd_epi32((__m512i)total, weights, _mm512_set1_epi32(four));
    }
};
#elif defined(__AVX512BW__)
struct Int8Dot {
    static constexpr int kWeightOffset = 0;
    // vpmaddubsw multiplies unsigned by signed bytes: |w| * (x with the sign of w). Its sums of two products, at most
    // 2 * 127 * 127 = 32258, do not saturate 16 bits.
    __m512i magnitudes;
    __mmask64 negative;
    explicit Int8Dot(const int8_t* from) {
        const __m512i weights = _mm512_loadu_si512(from);
        magnitudes = _mm512_abs_epi8(weights);
        negative = _mm512_movepi8_mask(weights);
    }
    void add(Reg16i& total, const int8_t* row) const {
        int32_t four;
        memcpy(&four, row, sizeof four);
        const __m512i numbers = _mm512_set1_epi32(four);
        const __m512i with_sign = _mm512_mask_sub_epi8(numbers, negative, _mm512_setzero_si512(), numbers);
        const __m512i pairs = _mm512_maddubs_epi16(magnitudes, with_sign);
        total += (Vec16i)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct Int8Dot {
    static constexpr int kWeightOffset = 0;
    // As above, with vpsignb.
    __m256i weights[2], magnitudes[2];
    explicit Int8Dot(const int8_t* from) {
        for (int i = 0; i < 2; i++) {
            weights[i] = _mm256_loadu_si256((const __m256i*)from + i);
            magnitudes[i] = _mm256_abs_epi8(weights[i]);
        }
    }
    void add(Reg16i& total, const int8_t* row) const {
        int32_t four;
        memcpy(&four, row, sizeof four);
        const __m256i numbers = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
        for (int i = 0; i < 2; i++) {
            const __m256i pairs = _mm256_maddubs_epi16(magnitudes[i], _mm256_sign_epi8(numbers, weights[i]));
            total.regs[i] += (RegInt)_mm256_madd_epi16(pairs, ones);
        }
    }
};
#else
struct Int8Dot {
    static constexpr int kWeightOffset = 0;
    Vec16i weights[4];
    explicit Int8Dot(const int8_t* from) {
        Vec16i four;
        memcpy(&four, from, sizeof four);
        // Byte i of each 32 bits, sign-extended.
        for (int i = 0; i < 4; i++) weights[i] = (four << (24 - 8 * i)) >> 24;
    }
    void add(Reg16i& total, const int8_t* row) const {
        Vec16i sum = total;
        for (int i = 0; i < 4; i++) sum += weights[i] * row[i];
        memcpy(&total, &sum, sizeof total);
    }
};
#endif

// Rows m to m + kRows - 1, for kBlocks blocks of outputs, whose weights begin at weights[n].
template <int kRows, int kBlocks>
__attribute__((noinline)) void int8_accumulate(
    const Int8Rows& rows, int m, const int8_t* const (&weights)[kBlocks], int inputs, RowSums* to, int first
) {
    const int stride = padded_inputs(inputs);
    Vec16 totals[kRows][kBlocks] = {};
    for (int group = 0; group < group_count(inputs); group++) {
        Reg16i sums[kRows][kBlocks] = {};
        for (int k = group * kGroupInputs; k < std::min((group + 1) * kGroupInputs, stride); k += 4)
#pragma GCC unroll 2
            for (int n = 0; n < kBlocks; n++) {
                const Int8Dot step(weights[n] + (size_t)k * kVecSize);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; i++) step.add(sums[i][n], rows.row(m + i, inputs) + k);
            }
        for (int i = 0; i < kRows; i++)
            for (int n = 0; n < kBlocks; n++) {
                const Vec16i exact = (Vec16i)sums[i][n] - Int8Dot::kWeightOffset * rows.sum(m + i, inputs, group);
                totals[i][n] += rows.scale(m + i, inputs, group) * __builtin_convertvector(exact, Vec16);
            }
    }
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) store(to[i][first + n], totals[i][n]);
}

// One or two blocks of outputs: each pass of rows goes over all inputs. Rows are contiguous, not in tiles.
__attribute__((noinline)) inline void simd_int8_blocks(
    const Int8Rows& rows, int first, int count, const int8_t* weights, int inputs, int blocks, RowSums* totals
) {
    const int8_t* const second = weights + (size_t)(blocks - 1) * padded_inputs(inputs) * kVecSize;
    for_each_pass<INT_MAX, kInt8PassRows>(first, count, [&](int m, auto number) {
        constexpr int kRows = decltype(number)::value;
        if constexpr (2 * kRows <= kAccumulators)
            int8_accumulate<kRows, 2>(rows, first + m, {weights, second}, inputs, totals + m, 0);
        else {
            int8_accumulate<kRows, 1>(rows, first + m, {weights}, inputs, totals + m, 0);
            if (blocks == 2) int8_accumulate<kRows, 1>(rows, first + m, {second}, inputs, totals + m, 1);
        }
    });
}

#ifdef TRITONLM_BYTE_TILES
// The exact sums of one group of a row's inputs, for two blocks of outputs.
typedef int32_t GroupSums[2][kVecSize];

// Those of inputs [from, to), at most a group, of 16 rows and one or two blocks of outputs.
template <bool kPair>
void amx_int8_group(const int8_t* rows, int stride, const int8_t* weights, int from, int to, GroupSums* exact) {
    zero_accumulators();
    for (int k = from; k < to; k += kInt8Padding) {
        _tile_loadd(2, rows + k, stride);
        _tile_loadd(3, weights + (size_t)k * kVecSize, 64);
        _tile_dpbssd(0, 2, 3);
        if (!kPair) continue;
        _tile_loadd(3, weights + (size_t)(stride + k) * kVecSize, 64);
        _tile_dpbssd(1, 2, 3);
    }
    store_accumulators<kPair>(exact[0][0], exact[0][1], sizeof(GroupSums));
}

// One or two blocks of outputs for all rows: kCachedGroups groups of the inputs for all rows, then the next ones.
template <bool kPair>
__attribute__((noinline)) void amx_int8_blocks(
    const Int8Rows& rows, int first, int count, const int8_t* weights, int inputs, RowSums* totals
) {
    const int stride = padded_inputs(inputs), groups = group_count(inputs);
    alignas(kCacheLine) GroupSums exact[kTileRows];
    compiler_fence();
    for (int begin = 0; begin < groups; begin += kCachedGroups)
        for (int m = 0; m < count; m += kTileRows)
            for (int group = begin; group < std::min(begin + kCachedGroups, groups); group++) {
                const int from = group * kGroupInputs, to = std::min(from + kGroupInputs, stride);
                amx_int8_group<kPair>(rows.row(first + m, inputs), stride, weights, from, to, exact);
                for (int i = 0; i < std::min(kTileRows, count - m); i++)
                    for (int n = 0; n <= kPair; n++) {
                        Vec16i sums;
                        memcpy(&sums, exact[i][n], sizeof sums);
                        const Vec16 before = group ? load(totals[m + i][n]) : Vec16{};
                        const float scale = rows.scale(first + m + i, inputs, group);
                        store(totals[m + i][n], before + scale * __builtin_convertvector(sums, Vec16));
                    }
            }
}
#endif

// totals[i][n] = row first + i times block n, for one or two blocks.
inline void multiply_int8_blocks(
    const Int8Rows& rows, int first, int count, const int8_t* weights, int inputs, int blocks, RowSums* totals
) {
#ifdef TRITONLM_BYTE_TILES
    if (amx_available() && blocks == 2) return amx_int8_blocks<true>(rows, first, count, weights, inputs, totals);
    if (amx_available()) return amx_int8_blocks<false>(rows, first, count, weights, inputs, totals);
#endif
    simd_int8_blocks(rows, first, count, weights, inputs, blocks, totals);
}
