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

#include "rows.hpp"
#include "team.hpp"
#include "tiles.hpp"

// At most so many rows go together; and so many inputs of two blocks of weights stay in the first cache while rows pass.
constexpr int kMostRows = 192, kNear = 384;

#ifdef __AMX_BF16__
// What the tiles have summed for sixteen rows: 0 of one block of outputs, 1 of a second one.
template <bool kPair, typename Number>
void load_sums(const Number (*from)[kTileRows][kLanes]) {
    _tile_loadd(0, from[0], 64);
    if (kPair) _tile_loadd(1, from[1], 64);
}

template <bool kPair, typename Number>
void store_sums(Number (*to)[kTileRows][kLanes]) {
    _tile_stored(0, to[0], 64);
    if (kPair) _tile_stored(1, to[1], 64);
    before_tiles();
}

// Four registers of eight. As measured, all eight take several times as long while a neighbour computes in tiles too, as if
// two threads of a core shared what is behind these names; four take twice as long then, and are as fast alone.
template <bool kPair>
void add_in_tiles(const bf16* rows, const bf16* first, const bf16* second, int inputs) {
    for (int k = 0; k < inputs; k += 32) {
        _tile_loadd(2, rows + (size_t)k * kTileRows, 64);
        _tile_loadd(3, first + (size_t)k * kLanes, 64);
        _tile_dpbf16ps(0, 2, 3);
        if (!kPair) continue;
        _tile_loadd(3, second + (size_t)k * kLanes, 64);
        _tile_dpbf16ps(1, 2, 3);
    }
}

// Two blocks of outputs, or one, for all rows: some of the inputs for all of them, and then the next ones.
template <bool kPair, typename Done>
void amx_columns(const Rows<bf16>& rows, int from, int count, const bf16* weights, int block, Done done) {
    const int inputs = rows.inputs();
    const bf16 *first = weights + (size_t)block * inputs * kLanes, *second = first + (size_t)inputs * kLanes;
    alignas(64) float sums[kMostRows / kTileRows][2][kTileRows][kLanes];
    before_tiles();
    for (int near = 0; near < inputs; near += kNear) {
        const int some = std::min(kNear, inputs - near);
        const size_t passed = (size_t)near * kLanes;
        for (int m = 0; m < count; m += kTileRows) {
            auto* of_rows = sums[m / kTileRows];
            if (near) load_sums<kPair>(of_rows);
            else clear_sums();
            add_in_tiles<kPair>(rows.at(from + m, near), first + passed, second + passed, some);
            store_sums<kPair>(of_rows);
            if (near + some < inputs) continue;
            for (int i = 0; i < std::min(kTileRows, count - m); i++)
                for (int n = 0; n <= kPair; n++) done(from + m + i, block + n, load(of_rows[n][i]));
        }
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
void tile(const Rows<typename Sum::Type>& rows, const typename Sum::Type* weights, int m, int block, Done done) {
    const int inputs = rows.inputs();
    Lanes totals[kRows][kBlocks] = {};
    const typename Sum::Type* row[kRows];
    for (int i = 0; i < kRows; i++) row[i] = rows.at(m + i);
    for (int k = 0; k < inputs; k += Sum::kInputs) {
        for (int n = 0; n < kBlocks; n++) {
            const Sum step(weights + ((size_t)(block + n) * inputs + k) * kLanes);
            for (int i = 0; i < kRows; i++) step.add(totals[i][n], row[i] + k);
        }
    }
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) done(m + i, block + n, totals[i][n]);
}

template <typename Sum, int kBlocks, typename Done>
void columns(const Rows<typename Sum::Type>& rows, int m, int count, const typename Sum::Type* weights, int block, Done done) {
    const int end = m + count;
    for (; m + 8 <= end; m += 8) tile<Sum, 8, kBlocks>(rows, weights, m, block, done);
    if (end - m >= 4) tile<Sum, 4, kBlocks>(rows, weights, m, block, done), m += 4;
    if (end - m >= 2) tile<Sum, 2, kBlocks>(rows, weights, m, block, done), m += 2;
    if (end - m >= 1) tile<Sum, 1, kBlocks>(rows, weights, m, block, done);
}

template <typename Sum, typename Done>
void pair_or_one(
    const Rows<typename Sum::Type>& rows, int from, int count, const typename Sum::Type* weights, int block, bool pair, Done done
) {
    if (pair) columns<Sum, 2>(rows, from, count, weights, block, done);
    else columns<Sum, 1>(rows, from, count, weights, block, done);
}

template <typename Done>
void product(const Rows<float>& rows, int from, int count, const float* weights, int block, bool pair, Done done) {
    pair_or_one<FloatSum>(rows, from, count, weights, block, pair, done);
}

template <typename Done>
void product(const Rows<bf16>& rows, int from, int count, const bf16* weights, int block, bool pair, Done done) {
#ifdef __AMX_BF16__
    if (tiles_are_ours()) {
        if (pair) amx_columns<true>(rows, from, count, weights, block, done);
        else amx_columns<false>(rows, from, count, weights, block, done);
        return;
    }
#endif
    pair_or_one<HalfSum>(rows, from, count, weights, block, pair, done);
}

// So many rows at a time stay in the second cache while the weights pass by.
template <typename T>
int rows_together(int inputs, int most) {
    constexpr size_t kBytes = 1 << 20;
    const size_t fit = kBytes / (inputs * sizeof(T)) / kTileRows * kTileRows;
    return std::clamp<size_t>(fit, kTileRows, most);
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
void multiply(const Rows<T>& rows, int count, const T* weights, int outputs, Share& share, Done done) {
    const int most = rows_together<T>(rows.inputs(), kMostRows);
    each_pair(count, most, outputs / kLanes, share, [&](int first, int some, int at, bool pair) {
        product(rows, first, some, weights, at, pair, done);
    });
}
