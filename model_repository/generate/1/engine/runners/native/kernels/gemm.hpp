// Rows times packed weights. Each number of the result is summed over the inputs in one order, whatever the number of
// rows: a row's result is the same, bit for bit, alone or among others.
//
// Weights are packed in blocks of sixteen outputs: [outputs/16][inputs][16] in float32, [outputs/16][inputs/2][16][2] in
// bfloat16, as the machine's own instructions for bfloat16 (AMX, AVX512-BF16) read them; or tighter, see tight.hpp.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "near.hpp"
#include "rows.hpp"
#include "team.hpp"
#include "tiles.hpp"

// At most so many rows go together.
constexpr int kMostRows = 192;

// What has been summed for sixteen rows: of one block of outputs, and of a second one.
typedef float Sums[2][kTileRows][kLanes];

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

// For sixteen rows more: 4 and 5.
inline void clear_second_sums() {
    _tile_zero(4);
    _tile_zero(5);
}

template <bool kPair>
void store_second_sums(float (*to)[kTileRows][kLanes]) {
    _tile_stored(4, to[0], 64);
    if (kPair) _tile_stored(5, to[1], 64);
    before_tiles();
}

// For sixteen rows four registers of eight, six for twice as many. As measured, all eight take several times as long while a
// neighbour computes in tiles too, as if two threads of a core shared what is behind these names; four take twice as long
// then, and are as fast alone.
template <bool kPair, bool kTwice>
void add_in_tiles(const Rows<bf16>& rows, int m, Near<bf16>& weights, int from, int to, Sums* sums) {
    const bf16 *row = rows.at(m, from), *later_row = rows.at(m + kTileRows * kTwice, from);
    const bf16 *one = weights.block(0), *other = weights.block(kPair);
    if (from) load_sums<kPair>(sums[0]);
    else clear_sums();
    if (kTwice) clear_second_sums();
    for (int k = from, reached = from; k < to; k += kTileInputs) {
        if (k == reached) reached = weights.reach(k);
        const size_t tile = weights.offset(k), of_rows = (size_t)(k - from) * kTileRows;
        before_tiles();
        _tile_loadd(2, row + of_rows, 64);
        _tile_loadd(3, one + tile, 64);
        _tile_dpbf16ps(0, 2, 3);
        if (kPair) {
            _tile_loadd(3, other + tile, 64);
            _tile_dpbf16ps(1, 2, 3);
        }
        if (!kTwice) continue;
        _tile_loadd(2, later_row + of_rows, 64);
        if (kPair) {
            _tile_dpbf16ps(5, 2, 3);
            _tile_loadd(3, one + tile, 64);
        }
        _tile_dpbf16ps(4, 2, 3);
    }
    store_sums<kPair>(sums[0]);
    if (kTwice) store_second_sums<kPair>(sums[1]);
}
#endif

// What one step of the sum adds: inputs k (float32) or k and k + 1 (bfloat16) of one row, to sixteen outputs.
struct FloatSum {
    typedef float Type;
    static constexpr int kInputs = 1;
    Sixteen weights;
    explicit FloatSum(const float* from) : weights(sixteen(from)) {}
    void add(Sixteen& total, const float* row) const { total += *row * weights; }
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
    Sixteen even, odd;
    explicit HalfSum(const bf16* from) { split_pairs(from, even, odd); }
    void add(Sixteen& total, const float* row) const {
        total += row[0] * even;
        total += row[1] * odd;
    }
};
#endif

// So many rows are summed with both blocks of weights, and at most so many with one: six sums of one block, beside its
// weights alone, still fit where four stand for a pair's.
constexpr int kRowsOfPair = kSumsInRegisters / 2, kRowsTogether = kSumsInRegisters == 4 ? 6 : 8;

// `first` is the first of these rows among the sixteen that are summed together, `block` the first of so many blocks.
template <typename Sum, int kRows, int kBlocks, typename T = typename Sum::Type>
void add_in_lanes(const Rows<T>& rows, int m, Near<T>& weights, int from, int to, Sums& sums, int first, int block) {
    Sixteen totals[kRows][kBlocks] = {};
    const RowOf<T>* row[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
        row[i] = rows.at(m + first + i);
#pragma GCC unroll 8
        for (int n = 0; from && n < kBlocks; n++) totals[i][n] = sixteen(sums[block + n][first + i]);
    }
    for (int begin = from, end; begin < to; begin = end) {
        end = weights.reach(begin);
        const T* near[kBlocks];
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; n++) near[n] = weights.block(block + n) + weights.offset(begin);
        for (int k = 0; k < end - begin; k += Sum::kInputs)
#pragma GCC unroll 8
            for (int n = 0; n < kBlocks; n++) {
                const Sum step(near[n] + (size_t)k * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; i++) step.add(totals[i][n], row[i] + begin + k);
            }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; n++) store(sums[block + n][first + i], totals[i][n]);
}

template <typename Sum, int kRows, bool kPair, typename T = typename Sum::Type>
void add_rows(const Rows<T>& rows, int m, Near<T>& weights, int from, int to, Sums& sums, int first) {
    if constexpr (kPair && kRows > kRowsOfPair)
        for (int block = 0; block < 2; block++)
            add_in_lanes<Sum, kRows, 1>(rows, m, weights, from, to, sums, first, block);
    else add_in_lanes<Sum, kRows, 1 + kPair>(rows, m, weights, from, to, sums, first, 0);
}

template <typename Sum, bool kPair, typename T = typename Sum::Type>
void add_in_lanes(const Rows<T>& rows, int m, int count, Near<T>& weights, int from, int to, Sums& sums) {
    int i = 0;
    for (; i + kRowsTogether <= count; i += kRowsTogether)
        add_rows<Sum, kRowsTogether, kPair>(rows, m, weights, from, to, sums, i);
    if (count - i >= 4) add_rows<Sum, 4, kPair>(rows, m, weights, from, to, sums, i), i += 4;
    if (count - i >= 2) add_rows<Sum, 2, kPair>(rows, m, weights, from, to, sums, i), i += 2;
    if (count - i >= 1) add_rows<Sum, 1, kPair>(rows, m, weights, from, to, sums, i);
}

// What these inputs add to the sums of so many rows: thirty-two at most where tiles compute, all inputs at once then, and
// sixteen elsewhere.
template <bool kPair>
void add_inputs(const Rows<float>& rows, int m, int count, Near<float>& weights, int from, int to, Sums* sums) {
    add_in_lanes<FloatSum, kPair>(rows, m, count, weights, from, to, *sums);
}

template <bool kPair>
void add_inputs(const Rows<bf16>& rows, int m, int count, Near<bf16>& weights, int from, int to, Sums* sums) {
#ifdef __AMX_BF16__
    if (tiles_are_ours() && count > kTileRows) return add_in_tiles<kPair, true>(rows, m, weights, from, to, sums);
    if (tiles_are_ours()) return add_in_tiles<kPair, false>(rows, m, weights, from, to, sums);
#endif
    add_in_lanes<HalfSum, kPair>(rows, m, count, weights, from, to, *sums);
}

// Whether so many rows see each weight once only.
template <typename T>
bool come_at_once(int count) {
    return tiles_compute<T>() ? count <= 2 * kTileRows : count <= kRowsOfPair && (count & (count - 1)) == 0;
}

// Two blocks of outputs, or one, for all rows: some of the inputs for all of them, and then the next ones. By itself, not
// within its callers: their code around it, twice, made it slower by a sixth.
template <bool kPair, typename T, typename Done>
__attribute__((noinline)) void columns(
    const Rows<T>& rows, int first, int count, const Packed<T>& packed, int block, Claim& claim, Done done
) {
    const bool once = come_at_once<T>(count);
    const int inputs = rows.inputs(), at_once = once ? count : kTileRows;
    Near<T> weights(packed, inputs, block, 1 + kPair, once);
    alignas(64) Sums sums[kMostRows / kTileRows];
    for (int from = 0; from < inputs; from += weights.together()) {
        const int to = std::min(from + weights.together(), inputs);
        weights.begin(from, to);
        for (int m = 0; m < count; m += at_once) {
            const int some = std::min(at_once, count - m);
            add_inputs<kPair>(rows, first + m, some, weights, from, to, sums + m / kTileRows);
            if (to < inputs || !claim.mine()) continue;
            for (int i = m; i < m + some; i++)
                for (int n = 0; n <= kPair; n++) done(first + i, block + n, load(sums[i / kTileRows][n][i % kTileRows]));
        }
    }
}

// So many rows at a time stay in the second cache while the weights pass by.
template <typename T>
int rows_together(int inputs, int most) {
    constexpr size_t kBytes = 1 << 20;
    const size_t fit = kBytes / (inputs * sizeof(T)) / kTileRows * kTileRows;
    return std::clamp<size_t>(fit, kTileRows, most);
}

// What is left of the outputs, two blocks of sixteen at a time, for some of the rows at a time: `task(first row, how many,
// first block, whether there is a second, the claim to its outputs)`.
template <typename Task>
void each_pair(int count, int most, int blocks, Share& share, Task task) {
    const int pairs = (blocks + 1) / 2, parts = (count + most - 1) / most;
    share.race(parts * pairs, [&](int i, Claim& claim) {
        const int first = i / pairs * most, block = i % pairs * 2;
        task(first, std::min(most, count - first), block, block + 1 < blocks, claim);
    });
}

// `done(row, block, sixteen numbers)` takes them.
template <typename T, typename Done>
void multiply(const Rows<T>& rows, int count, const Packed<T>& weights, int outputs, Share& share, Done done) {
    const int most = rows_together<RowOf<T>>(rows.inputs(), kMostRows);
    each_pair(count, most, outputs / kLanes, share, [&](int first, int some, int at, bool pair, Claim& claim) {
        if (pair) columns<true>(rows, first, some, weights, at, claim, done);
        else columns<false>(rows, first, some, weights, at, claim, done);
    });
}
