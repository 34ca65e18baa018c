// Rows times packed weights. Each number of the result is summed over the inputs in one order, whatever the number of
// rows: a row's result is the same, bit for bit, alone or among others.
//
// Weights are packed in blocks of sixteen outputs: [outputs/16][inputs][16] in float32, [outputs/16][inputs/2][16][2] in
// bfloat16, as the machine's own instructions for bfloat16 (AMX, AVX512-BF16) read them.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "lanes.hpp"
#include "team.hpp"
#include "tiles.hpp"

#ifdef __AMX_BF16__
// Onto what the tiles hold: so many inputs of sixteen rows, or of twice as many where there are `lower` ones, times those
// of two blocks of outputs or of one.
template <bool kPair>
void add_in_tiles(const bf16* upper, const bf16* lower, int stride, const bf16* first, const bf16* second, int inputs) {
    before_tiles();
    for (int k = 0; k < inputs; k += 32) {
        _tile_loadd(6, first + (size_t)k * kLanes, 64);
        if (kPair) _tile_loadd(7, second + (size_t)k * kLanes, 64);
        _tile_loadd(4, upper + k, stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (kPair) _tile_dpbf16ps(1, 4, 7);
        if (lower) {
            _tile_loadd(5, lower + k, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (kPair) _tile_dpbf16ps(3, 5, 7);
        }
    }
    before_tiles();
}

inline void clear_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// What the tiles hold of so many rows: a pair's first block before its second.
template <bool kPair, typename Number>
void store_tiles(Number (*out)[kTileRows][kLanes], int count) {
    _tile_stored(0, out[0], 64);
    if (kPair) _tile_stored(1, out[1], 64);
    if (count > kTileRows) _tile_stored(2, out[2], 64);
    if (count > kTileRows && kPair) _tile_stored(3, out[3], 64);
    before_tiles();
}

template <bool kPair, typename Done>
void take_tiles(int m, int count, int block, Done done) {
    alignas(64) float out[4][kTileRows][kLanes];
    store_tiles<kPair>(out, count);
    for (int i = 0; i < std::min(2 * kTileRows, count); i++)
        for (int n = 0; n <= kPair; n++) done(m + i, block + n, load(out[i / kTileRows * 2 + n][i % kTileRows]));
}

// Two blocks of outputs, or one, for all rows.
template <bool kPair, typename Done>
void amx_columns(const bf16* rows, int count, const bf16* weights, int inputs, int block, Done done) {
    const bf16 *first = weights + (size_t)block * inputs * kLanes, *second = first + (size_t)inputs * kLanes;
    for (int m = 0; m < count; m += 2 * kTileRows) {
        const bf16* upper = rows + (size_t)m * inputs;
        clear_tiles();
        add_in_tiles<kPair>(upper, count - m > kTileRows ? upper + (size_t)kTileRows * inputs : nullptr, inputs, first, second, inputs);
        take_tiles<kPair>(m, count - m, block, done);
    }
}
#endif

// What one step of the sum adds: inputs k (float32) or k and k + 1 (bfloat16) of one row, to sixteen outputs.
struct FloatSum {
    typedef float Type;
    static constexpr int kInputs = 1;
    Lanes weights;
    explicit FloatSum(const float* from) : weights(load(from)) {}
    void add(Lanes& total, const float* row) const { total += *row * weights; }
};

#ifdef __AVX512BF16__
struct HalfSum {
    typedef bf16 Type;
    static constexpr int kInputs = 2;
    __m512i weights;
    explicit HalfSum(const bf16* from) : weights(_mm512_loadu_si512(from)) {}
    void add(Lanes& total, const bf16* row) const {
        int32_t pair;
        memcpy(&pair, row, sizeof pair);
        total = (Lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
    }
};
#else
struct HalfSum {
    typedef bf16 Type;
    static constexpr int kInputs = 2;
    Lanes even, odd;
    explicit HalfSum(const bf16* from) {
        Words pairs;
        memcpy(&pairs, from, sizeof pairs);
        even = (Lanes)(pairs << 16);
        odd = (Lanes)(pairs & 0xffff0000u);
    }
    void add(Lanes& total, const bf16* row) const {
        total += value(row[0]) * even;
        total += value(row[1]) * odd;
    }
};
#endif

template <typename Sum, int kRows, int kBlocks, typename Done>
void tile(const typename Sum::Type* rows, const typename Sum::Type* weights, int inputs, int m, int block, Done done) {
    Lanes totals[kRows][kBlocks] = {};
    for (int k = 0; k < inputs; k += Sum::kInputs) {
        for (int n = 0; n < kBlocks; n++) {
            const Sum step(weights + ((size_t)(block + n) * inputs + k) * kLanes);
            for (int i = 0; i < kRows; i++) step.add(totals[i][n], rows + (size_t)(m + i) * inputs + k);
        }
    }
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) done(m + i, block + n, totals[i][n]);
}

template <typename Sum, int kBlocks, typename Done>
void columns(const typename Sum::Type* rows, int count, const typename Sum::Type* weights, int inputs, int block, Done done) {
    int m = 0;
    for (; m + 8 <= count; m += 8) tile<Sum, 8, kBlocks>(rows, weights, inputs, m, block, done);
    if (count - m >= 4) tile<Sum, 4, kBlocks>(rows, weights, inputs, m, block, done), m += 4;
    if (count - m >= 2) tile<Sum, 2, kBlocks>(rows, weights, inputs, m, block, done), m += 2;
    if (count - m >= 1) tile<Sum, 1, kBlocks>(rows, weights, inputs, m, block, done);
}

template <typename Sum, typename Done>
void pair_or_one(const typename Sum::Type* rows, int count, const typename Sum::Type* weights, int inputs, int block, bool pair, Done done) {
    if (pair) columns<Sum, 2>(rows, count, weights, inputs, block, done);
    else columns<Sum, 1>(rows, count, weights, inputs, block, done);
}

template <typename Done>
void product(const float* rows, int count, const float* weights, int inputs, int block, bool pair, Done done) {
    pair_or_one<FloatSum>(rows, count, weights, inputs, block, pair, done);
}

template <typename Done>
void product(const bf16* rows, int count, const bf16* weights, int inputs, int block, bool pair, Done done) {
#ifdef __AMX_BF16__
    if (tiles_are_ours()) {
        if (pair) amx_columns<true>(rows, count, weights, inputs, block, done);
        else amx_columns<false>(rows, count, weights, inputs, block, done);
        return;
    }
#endif
    pair_or_one<HalfSum>(rows, count, weights, inputs, block, pair, done);
}

// So many rows at a time stay in the second cache while the weights pass by.
template <typename T>
int rows_together(int inputs) {
    constexpr size_t kBytes = 1 << 20;
    const size_t fit = kBytes / (inputs * sizeof(T)) / (2 * kTileRows) * 2 * kTileRows;
    return std::max<size_t>(fit, 2 * kTileRows);
}

// What is left of the outputs, two blocks of sixteen at a time, for some of the rows at a time: `task(first row, how many,
// first block, whether there is a second)`.
template <typename Task>
void each_pair(int count, int most, int blocks, Share& share, Task task) {
    const int pairs = (blocks + 1) / 2, parts = (count + most - 1) / most;
    share.each(parts * pairs, [&](int i) {
        const int first = i / pairs * most, block = i % pairs * 2;
        task(first, std::min(most, count - first), block, block + 1 < blocks);
    });
}

// `done(row, block, sixteen numbers)` takes them.
template <typename T, typename Done>
void multiply(const T* rows, int count, const T* weights, int inputs, int outputs, Share& share, Done done) {
    each_pair(count, rows_together<T>(inputs), outputs / kLanes, share, [&](int first, int some, int at, bool pair) {
        product(rows + (size_t)first * inputs, some, weights, inputs, at, pair,
            [&](int row, int block, Lanes found) { done(first + row, block, found); });
    });
}
