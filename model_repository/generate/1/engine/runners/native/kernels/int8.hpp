// int8 GEMM: y[r][o] = scale[o] * sum over groups g of (scale[r][g] * sum over k in g of xq[r][k] * wq[o][k]).
// Weights have a scale for each output (weights.py); rows are quantized just before the matmul, with a scale for each group
// of 256 inputs: scale = max |x| / 127, xq = round(x / scale). The inner sums are exact integers, equal in any order and on
// any machine; the outer sums are float32 in the order of the groups.
//
// Layout: wq [outputs / 16][inputs / 4][16][4], with inputs padded by zeros to a multiple of 64:
//   wq[o][k] at ((o / 16) * padded / 4 + k / 4) * 64 + (o % 16) * 4 + k % 4;  xq[r][k] at r * padded + k
// ISA variants: __AMX_INT8__ (and amx_available() at run time) multiplies tiles; __AVX512VNNI__ uses vpdpbusd; __AVX2__ uses
// vpmaddubsw; otherwise compiler vectors. Test: tests/inference/test_int8.py.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "amx.hpp"
#include "gemm.hpp"
#include "simd.hpp"
#include "thread_pool.hpp"

// Inputs are padded to the row of a tile, 64 bytes. A scale covers 256 inputs: four such rows.
constexpr int kInt8Padding = 64, kGroupInputs = 256;
// Rows of one work item at most: bounds the totals on the stack (64 KiB). Groups of two blocks of weights that stay in the
// first-level cache while rows pass: 3 * 256 inputs * 32 outputs = 24 KiB.
constexpr int kMaxInt8Rows = 512, kCachedGroups = 3;
// Quantized numbers are -127 to 127.
constexpr float kInt8Max = 127.0f;

inline int padded_inputs(int inputs) { return (inputs + kInt8Padding - 1) / kInt8Padding * kInt8Padding; }
inline int group_count(int inputs) { return (inputs + kGroupInputs - 1) / kGroupInputs; }

// The quantized rows of one matmul.
class Int8Rows {
  public:
    void reserve(size_t rows, int inputs) {
        numbers_.resize(std::max(numbers_.size(), rows * padded_inputs(inputs)));
        scales_.resize(std::max(scales_.size(), rows * group_count(inputs)));
        sums_.resize(scales_.size());
    }

    template <typename T>
    void quantize(const T* from, int row, int inputs) {
        const int groups = group_count(inputs);
        int8_t* to = &numbers_[(size_t)row * padded_inputs(inputs)];
        for (int group = 0; group < groups; group++) {
            const int first = group * kGroupInputs, count = std::min(kGroupInputs, inputs - first);
            quantize_group(from + first, count, to + first, (size_t)row * groups + group);
        }
        std::fill(to + inputs, to + padded_inputs(inputs), 0);
    }

    const int8_t* row(int row, int inputs) const { return &numbers_[(size_t)row * padded_inputs(inputs)]; }
    float scale(int row, int inputs, int group) const { return scales_[(size_t)row * group_count(inputs) + group]; }
    int32_t sum(int row, int inputs, int group) const { return sums_[(size_t)row * group_count(inputs) + group]; }

  private:
    // A group with a NaN gets the scale NaN, and so do its results.
    template <typename T>
    void quantize_group(const T* from, int count, int8_t* to, size_t group) {
        Vec16 maxima = {};
        Vec16i nan_mask = {}, total = {};
        for (int k = 0; k < count; k += kVecSize) {
            const Vec16 values = load(from + k), magnitudes = values < 0.0f ? -values : values;
            maxima = magnitudes > maxima ? magnitudes : maxima;
            nan_mask |= values != values;
        }
        const float max = reduce_max(maxima), inverse_scale = max > 0.0f ? kInt8Max / max : 0.0f;
        for (int k = 0; k < count; k += kVecSize) {
            const Vec16i rounded = (Vec16i)(load(from + k) * inverse_scale + kRoundToInt) - kRoundToIntBits;
            const Vec16b bytes = __builtin_convertvector(rounded, Vec16b);
            memcpy(to + k, &bytes, sizeof bytes);
            total += rounded;
        }
        int32_t sum = 0, has_nan = 0;
        for (int i = 0; i < kVecSize; i++) sum += total[i], has_nan |= nan_mask[i];
        scales_[group] = has_nan ? __builtin_nanf("") : max / kInt8Max;
        sums_[group] = sum;
    }

    AlignedVector<int8_t> numbers_;
    AlignedVector<float> scales_;
    // The sum of a group's numbers, for kWeightOffset.
    AlignedVector<int32_t> sums_;
};

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
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct Int8Dot {
    static constexpr int kWeightOffset = 0;
    // vpmaddubsw multiplies unsigned by signed bytes: |w| * (x with the sign of w). Its sums of two products, at most
    // 2 * 127 * 127 = 32258, do not saturate 16 bits.
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

// Rows m to m + kRows - 1, for blocks `first` to first + kBlocks - 1 of kAllBlocks.
template <int kRows, int kBlocks, int kAllBlocks>
void int8_accumulate(
    const Int8Rows& rows, const int8_t* weights, int inputs, int m, int first, Vec16 (*totals)[kAllBlocks]
) {
    const int stride = padded_inputs(inputs);
    for (int group = 0; group < group_count(inputs); group++) {
        Reg16i sums[kRows][kBlocks] = {};
        for (int k = group * kGroupInputs; k < std::min((group + 1) * kGroupInputs, stride); k += 4)
#pragma GCC unroll 2
            for (int n = 0; n < kBlocks; n++) {
                const Int8Dot step(weights + ((size_t)(first + n) * stride + k) * kVecSize);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; i++) step.add(sums[i][n], rows.row(m + i, inputs) + k);
            }
        for (int i = 0; i < kRows; i++)
            for (int n = 0; n < kBlocks; n++) {
                const Vec16i exact = (Vec16i)sums[i][n] - Int8Dot::kWeightOffset * rows.sum(m + i, inputs, group);
                totals[i][first + n] += rows.scale(m + i, inputs, group) * __builtin_convertvector(exact, Vec16);
            }
    }
}

template <int kRows, int kBlocks, typename Output>
void int8_pass(const Int8Rows& rows, const int8_t* weights, int inputs, int m, Claim& claim, Output output) {
    Vec16 totals[kRows][kBlocks] = {};
    constexpr int kBlocksPerPass = kRows * kBlocks > kAccumulators ? 1 : kBlocks;
    for (int n = 0; n < kBlocks; n += kBlocksPerPass) int8_accumulate<kRows, kBlocksPerPass>(rows, weights, inputs, m, n, totals);
    if (!claim.acquire()) return;
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) output(m + i, n, totals[i][n]);
}

template <int kBlocks, typename Output>
void simd_int8_blocks(
    const Int8Rows& rows, int first, int count, const int8_t* weights, int inputs, Claim& claim, Output output
) {
    int m = first;
    const int end = first + count;
    for (; m + kRowsPerPass <= end; m += kRowsPerPass)
        int8_pass<kRowsPerPass, kBlocks>(rows, weights, inputs, m, claim, output);
    if (end - m >= 4) int8_pass<4, kBlocks>(rows, weights, inputs, m, claim, output), m += 4;
    if (end - m >= 2) int8_pass<2, kBlocks>(rows, weights, inputs, m, claim, output), m += 2;
    if (end - m >= 1) int8_pass<1, kBlocks>(rows, weights, inputs, m, claim, output);
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// The exact sums of inputs [from, to), at most a group, of 16 rows and one or two blocks of outputs.
template <bool kPair>
void amx_int8_group(
    const int8_t* rows, int stride, const int8_t* weights, int from, int to, int32_t (*exact)[kTileRows][kVecSize]
) {
    zero_accumulators();
    for (int k = from; k < to; k += kInt8Padding) {
        _tile_loadd(2, rows + k, stride);
        _tile_loadd(3, weights + (size_t)k * kVecSize, 64);
        _tile_dpbssd(0, 2, 3);
        if (!kPair) continue;
        _tile_loadd(3, weights + (size_t)(stride + k) * kVecSize, 64);
        _tile_dpbssd(1, 2, 3);
    }
    store_accumulators<kPair>(exact);
}

// One or two blocks of outputs for all rows: kCachedGroups groups of the inputs for all rows, then the next ones.
template <bool kPair, typename Output>
__attribute__((noinline)) void amx_int8_blocks(
    const Int8Rows& rows, int first, int count, const int8_t* weights, int inputs, Claim& claim, Output output
) {
    const int stride = padded_inputs(inputs), groups = group_count(inputs);
    alignas(64) int32_t exact[2][kTileRows][kVecSize];
    alignas(64) float totals[kMaxInt8Rows][2][kVecSize];
    compiler_fence();
    for (int begin = 0; begin < groups; begin += kCachedGroups) {
        const int end = std::min(begin + kCachedGroups, groups);
        for (int m = 0; m < count; m += kTileRows) {
            const int some = std::min(kTileRows, count - m);
            for (int group = begin; group < end; group++) {
                const int from = group * kGroupInputs, to = std::min(from + kGroupInputs, stride);
                amx_int8_group<kPair>(rows.row(first + m, inputs), stride, weights, from, to, exact);
                for (int i = 0; i < some; i++)
                    for (int n = 0; n <= kPair; n++) {
                        Vec16i sums;
                        memcpy(&sums, exact[n][i], sizeof sums);
                        const Vec16 before = group ? load(totals[m + i][n]) : Vec16{};
                        const float scale = rows.scale(first + m + i, inputs, group);
                        store(totals[m + i][n], before + scale * __builtin_convertvector(sums, Vec16));
                    }
            }
            if (end < groups || !claim.acquire()) continue;
            for (int i = 0; i < some; i++)
                for (int n = 0; n <= kPair; n++) output(first + m + i, n, load(totals[m + i][n]));
        }
    }
}
#endif

template <bool kPair, typename Output>
void int8_blocks(const Int8Rows& rows, int first, int count, const int8_t* weights, int inputs, Claim& claim, Output output) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    if (amx_available()) return amx_int8_blocks<kPair>(rows, first, count, weights, inputs, claim, output);
#endif
    simd_int8_blocks<1 + kPair>(rows, first, count, weights, inputs, claim, output);
}

// Calls `output(row, block, 16 numbers)` with the results.
template <typename Output>
void matmul(
    const Int8Rows& rows, int count, const int8_t* weights, const float* scales, int inputs, int outputs, WorkQueue& queue,
    Output output
) {
    const int blocks = outputs / kVecSize, limit = rows_per_item<int8_t>(inputs, kMaxInt8Rows);
    const size_t block_size = (size_t)padded_inputs(inputs) * kVecSize;
    for_each_block_pair(count, limit, blocks, queue, [&](int first, int some, int block, bool pair, Claim& claim) {
        const auto scaled = [&](int row, int n, Vec16 sums) {
            output(row, block + n, sums * load(scales + (block + n) * kVecSize));
        };
        if (pair) int8_blocks<true>(rows, first, some, weights + block * block_size, inputs, claim, scaled);
        else int8_blocks<false>(rows, first, some, weights + block * block_size, inputs, claim, scaled);
    });
}
