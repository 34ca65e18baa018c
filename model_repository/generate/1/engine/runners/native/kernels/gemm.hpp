// GEMM: y[r][o] = sum over k of x[r][k] * w[o][k], x in Rows<T>, w packed, sums in float32. A result is summed over k in one
// order, whatever the number of rows: a row's result is the same bits alone and in a batch.
//
// Layout of w: blocks of 16 outputs, [outputs / 16][inputs / s][16][s], s = 1 in float32 and 2 in bfloat16:
//   w[o][k] at ((o / 16) * inputs / s + k / s) * 16 s + (o % 16) * s + k % s
// as AMX and AVX512-BF16 read bfloat16. bf16_packed.hpp compresses its tiles.
// ISA variants: __AMX_BF16__ (and amx_available() at run time) multiplies tiles of 16 x 32; __AVX512BF16__ uses vdpbf16ps;
// otherwise bfloat16 is converted and accumulated as float32 in Reg16. Test: tests/inference/test_native.py.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "amx.hpp"
#include "rows.hpp"
#include "thread_pool.hpp"
#include "tile_cache.hpp"

// Rows of one work item at most: bounds the accumulators on the stack (24 KiB).
constexpr int kMaxRows = 192;

// Partial sums of 16 rows: of one block of outputs, and of a second one.
typedef float TileSums[2][kTileRows][kVecSize];

#ifdef __AMX_BF16__
// Tiles 0 and 1 accumulate 16 rows: of one block of outputs, and of a second one.
template <bool kPair, typename Number>
void load_accumulators(const Number (*from)[kTileRows][kVecSize]) {
    _tile_loadd(0, from[0], 64);
    if (kPair) _tile_loadd(1, from[1], 64);
}

template <bool kPair, typename Number>
void store_accumulators(Number (*to)[kTileRows][kVecSize]) {
    _tile_stored(0, to[0], 64);
    if (kPair) _tile_stored(1, to[1], 64);
    compiler_fence();
}

// Tiles 4 and 5 accumulate another 16 rows.
inline void zero_second_accumulators() {
    _tile_zero(4);
    _tile_zero(5);
}

template <bool kPair>
void store_second_accumulators(float (*to)[kTileRows][kVecSize]) {
    _tile_stored(4, to[0], 64);
    if (kPair) _tile_stored(5, to[1], 64);
    compiler_fence();
}

// 16 rows use four of the eight tile registers, 32 rows six. Measured beside a neighbour that also uses AMX on the core's
// other thread: eight registers take several times as long as alone, four take twice as long; alone, four are as fast.
template <bool kPair, bool kTwice>
void amx_accumulate(const Rows<bf16>& rows, int m, TileCache<bf16>& weights, int from, int to, TileSums* sums) {
    const bf16 *row = rows.at(m, from), *second_row = rows.at(m + kTileRows * kTwice, from);
    const bf16 *block = weights.block(0), *second_block = weights.block(kPair);
    if (from) load_accumulators<kPair>(sums[0]);
    else zero_accumulators();
    if (kTwice) zero_second_accumulators();
    for (int k = from, ready = from; k < to; k += kTileInputs) {
        if (k == ready) ready = weights.prepare(k);
        const size_t tile = weights.offset(k), row_tile = (size_t)(k - from) * kTileRows;
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
    store_accumulators<kPair>(sums[0]);
    if (kTwice) store_second_accumulators<kPair>(sums[1]);
}
#endif

// One step of the sum: the weights of 16 outputs for kInputs inputs, from input k on, and add(total, &x[r][k]).
struct Float32Fma {
    typedef float Type;
    static constexpr int kInputs = 1;
    Reg16 weights;
    explicit Float32Fma(const float* from) : weights(load_regs(from)) {}
    void add(Reg16& total, const float* row) const { total += *row * weights; }
};

#ifdef __AVX512BF16__
struct Bf16Fma {
    typedef bf16 Type;
    static constexpr int kInputs = 2;
    __m512i weights;
    explicit Bf16Fma(const bf16* from) : weights(_mm512_loadu_si512(from)) {}
    void add(Vec16& total, const bf16* row) const {
        int32_t pair;
        memcpy(&pair, row, sizeof pair);
        total = (Vec16)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
    }
};
#else
struct Bf16Fma {
    typedef bf16 Type;
    static constexpr int kInputs = 2;
    Reg16 even, odd;
    explicit Bf16Fma(const bf16* from) { split_pairs(from, even, odd); }
    void add(Reg16& total, const float* row) const {
        total += row[0] * even;
        total += row[1] * odd;
    }
};
#endif

// Rows that accumulate two blocks at once, so that the accumulators fit the registers; more rows accumulate one block after
// the other. A pass is 8 rows, or 6 where kAccumulators is 4: with one block's weights, 6 accumulators fit.
constexpr int kRowsPerPair = kAccumulators / 2, kRowsPerPass = kAccumulators == 4 ? 6 : 8;

// Accumulates rows m + first to m + first + kRows - 1, for blocks `block` to block + kBlocks - 1.
template <typename Fma, int kRows, int kBlocks, typename T = typename Fma::Type>
void simd_accumulate(const Rows<T>& rows, int m, TileCache<T>& weights, int from, int to, TileSums& sums, int first, int block) {
    Reg16 totals[kRows][kBlocks] = {};
    const RowType<T>* row[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
        row[i] = rows.at(m + first + i);
#pragma GCC unroll 8
        for (int n = 0; from && n < kBlocks; n++) totals[i][n] = load_regs(sums[block + n][first + i]);
    }
    for (int begin = from, end; begin < to; begin = end) {
        end = weights.prepare(begin);
        const T* tiles[kBlocks];
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; n++) tiles[n] = weights.block(block + n) + weights.offset(begin);
        for (int k = 0; k < end - begin; k += Fma::kInputs)
#pragma GCC unroll 8
            for (int n = 0; n < kBlocks; n++) {
                const Fma step(tiles[n] + (size_t)k * kVecSize);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; i++) step.add(totals[i][n], row[i] + begin + k);
            }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; n++) store(sums[block + n][first + i], totals[i][n]);
}

template <typename Fma, int kRows, bool kPair, typename T = typename Fma::Type>
void accumulate_pass(const Rows<T>& rows, int m, TileCache<T>& weights, int from, int to, TileSums& sums, int first) {
    if constexpr (kPair && kRows > kRowsPerPair)
        for (int block = 0; block < 2; block++)
            simd_accumulate<Fma, kRows, 1>(rows, m, weights, from, to, sums, first, block);
    else simd_accumulate<Fma, kRows, 1 + kPair>(rows, m, weights, from, to, sums, first, 0);
}

template <typename Fma, bool kPair, typename T = typename Fma::Type>
void simd_accumulate(const Rows<T>& rows, int m, int count, TileCache<T>& weights, int from, int to, TileSums& sums) {
    int i = 0;
    for (; i + kRowsPerPass <= count; i += kRowsPerPass)
        accumulate_pass<Fma, kRowsPerPass, kPair>(rows, m, weights, from, to, sums, i);
    if (count - i >= 4) accumulate_pass<Fma, 4, kPair>(rows, m, weights, from, to, sums, i), i += 4;
    if (count - i >= 2) accumulate_pass<Fma, 2, kPair>(rows, m, weights, from, to, sums, i), i += 2;
    if (count - i >= 1) accumulate_pass<Fma, 1, kPair>(rows, m, weights, from, to, sums, i);
}

// Adds the inputs [from, to) to the sums of rows m to m + count - 1: at most 16 rows, or with AMX 32 of them, if [from, to)
// is all inputs.
template <bool kPair>
void accumulate(const Rows<float>& rows, int m, int count, TileCache<float>& weights, int from, int to, TileSums* sums) {
    simd_accumulate<Float32Fma, kPair>(rows, m, count, weights, from, to, *sums);
}

template <bool kPair>
void accumulate(const Rows<bf16>& rows, int m, int count, TileCache<bf16>& weights, int from, int to, TileSums* sums) {
#ifdef __AMX_BF16__
    if (amx_available() && count > kTileRows) return amx_accumulate<kPair, true>(rows, m, weights, from, to, sums);
    if (amx_available()) return amx_accumulate<kPair, false>(rows, m, weights, from, to, sums);
#endif
    simd_accumulate<Bf16Fma, kPair>(rows, m, count, weights, from, to, *sums);
}

// Whether `count` rows read each weight once: they fit one AMX call, or one pass over two blocks (a power of two).
template <typename T>
bool is_single_pass(int count) {
    return uses_amx<T>() ? count <= 2 * kTileRows : count <= kRowsPerPair && (count & (count - 1)) == 0;
}

// One or two blocks of outputs, for rows first to first + count - 1: a chunk of the inputs for all rows, then the next chunk.
// noinline: inlined twice in its caller it was a sixth slower.
template <bool kPair, typename T, typename Output>
__attribute__((noinline)) void gemm_blocks(
    const Rows<T>& rows, int first, int count, const PackedWeights<T>& packed, int block, Claim& claim, Output output
) {
    const bool single_pass = is_single_pass<T>(count);
    const int inputs = rows.inputs(), rows_per_pass = single_pass ? count : kTileRows;
    TileCache<T> weights(packed, inputs, block, 1 + kPair, single_pass);
    alignas(kCacheLine) TileSums sums[kMaxRows / kTileRows];
    for (int from = 0; from < inputs; from += weights.chunk_inputs()) {
        const int to = std::min(from + weights.chunk_inputs(), inputs);
        weights.begin_chunk(from, to);
        for (int m = 0; m < count; m += rows_per_pass) {
            const int pass = std::min(rows_per_pass, count - m);
            accumulate<kPair>(rows, first + m, pass, weights, from, to, sums + m / kTileRows);
            if (to < inputs || !claim.acquire()) continue;
            for (int i = m; i < m + pass; i++)
                for (int n = 0; n <= kPair; n++) output(first + i, block + n, load(sums[i / kTileRows][n][i % kTileRows]));
        }
    }
}

// Rows that stay in the second-level cache while the weights pass, 1 MiB of them: a multiple of 16, at most `limit`.
template <typename T>
int rows_per_item(int inputs, int limit) {
    constexpr size_t kBytes = 1 << 20;
    const size_t fitting = kBytes / (inputs * sizeof(T)) / kTileRows * kTileRows;
    return std::clamp<size_t>(fitting, kTileRows, limit);
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

// Calls `output(row, block, 16 numbers)` with the results.
template <typename T, typename Output>
void matmul(const Rows<T>& rows, int count, const PackedWeights<T>& weights, int outputs, WorkQueue& queue, Output output) {
    const int limit = rows_per_item<RowType<T>>(rows.inputs(), kMaxRows);
    for_each_block_pair(count, limit, outputs / kVecSize, queue, [&](int first, int some, int block, bool pair, Claim& claim) {
        if (pair) gemm_blocks<true>(rows, first, some, weights, block, claim, output);
        else gemm_blocks<false>(rows, first, some, weights, block, claim, output);
    });
}
