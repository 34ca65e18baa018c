// The GEMM of several passes of rows, without AMX: sums[r][n] = sum over k of x[r][k] * w[n][k], for two blocks n of 16 outputs.
// A chunk of the inputs is multiplied for all rows, and memory is read meanwhile: each pass prefetches a share of the next one.
//
// Layout: gemm.hpp's. A chunk's weights, 24 KiB of plain ones, stay in the first-level cache. bf16_packed weights are unpacked
// once for all rows, by the first pass.
// ISA variants: those of fma.hpp with AVX-512; AVX2 and below do not use it (gemm.hpp). Test: tests/inference/test_native.py
// and test_bf16_packed.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "gemv.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "tile_cache.hpp"

// Inputs of a chunk, at most: two blocks * 384 inputs * 16 outputs * 2 bytes = 24 KiB of a cache of 32 or 48 KiB.
constexpr int kChunkInputs = 384;

// Blocks of outputs that a pass accumulates at once, as many as fit the registers.
constexpr int kPassBlocks = kAccumulators == 16 ? 2 : 1;

// Calls `pass(m, number of rows as a constant)` for rows first + m on: passes of at most kMost rows, each within a tile of rows
// (rows.hpp). A pass has 1, 2, 4, 8 or kMost rows; a tile is whole in memory, and results of rows beyond `count` are discarded.
template <int kTile, int kMost, typename Pass>
void for_each_pass(int first, int count, Pass pass) {
    for (int m = 0, some; m < count; m += some) {
        some = std::min({count - m, kMost, kTile - (first + m) % kTile});
        if (some == 1) pass(m, std::integral_constant<int, 1>());
        else if (some == 2) pass(m, std::integral_constant<int, 2>());
        else if (some <= 4) pass(m, std::integral_constant<int, 4>());
        else if (some <= 8 && kMost > 8) pass(m, std::integral_constant<int, std::min(8, kMost)>());
        else pass(m, std::integral_constant<int, kMost>());
    }
}

// The sums before the first input.
alignas(kCacheLine) constexpr RowSums kZeros[kPassRows] = {};

// Adds the inputs [from, to) to the sums of a pass; weights[n] begins with those of input `from`.
template <int kRows, typename T>
__attribute__((noinline)) void accumulate_chunk(
    const Rows<T>& rows, int m, const T* const (&weights)[2], int from, int to, RowSums* sums, ListedPrefetch& ahead
) {
    // A copy, which stays in registers: GCC stores what a reference points to at each step.
    ListedPrefetch lines = ahead;
    for (int block = 0; block < 2; block += kPassBlocks) {
        Accumulators<RowType<T>, kRows, kPassBlocks> totals;
        totals.load(from ? sums : kZeros, block);
        const RowType<T>* numbers = rows.at(m, from);
        for (int k = 0; k < to - from; k += kTileInputs, numbers += kTileInputs * rows.tile()) {
            const T* tiles[kPassBlocks];
            for (int n = 0; n < kPassBlocks; n++) tiles[n] = weights[block + n] + (size_t)k * kVecSize;
            accumulate_tile(totals, numbers, rows.tile(), tiles, lines);
        }
        totals.save(sums, block);
    }
    ahead = lines;
}

// A chunk's weights for the passes after the first one.
typedef bf16 UnpackedChunk[2][kChunkInputs * kVecSize];

// The same for packed weights, which are stored unpacked.
template <int kRows>
__attribute__((noinline)) void unpack_chunk(
    const Rows<bf16>& rows, int m, const UpperBytes& upper_bytes, PackedBlock (&packed)[2], UnpackedChunk& unpacked, int from,
    int to, RowSums* sums, ListedPrefetch& ahead
) {
#ifdef TRITONLM_UNPACKS
    // A pass of few rows, which would only be compiled for rows that begin within a tile.
    if constexpr (kRows < kRowsPerPass<bf16>) {
        for (int n = 0; n < 2; n++)
            for (int k = from; k < to; k += kTileInputs) packed[n].unpack(k, upper_bytes, unpacked[n] + (k - from) * kVecSize);
        return accumulate_chunk<kRows, bf16>(rows, m, {unpacked[0], unpacked[1]}, from, to, sums, ahead);
    }
    // Each block's lines, two at a time.
    const auto prefetch_lines = [&](const uint8_t*, int) __attribute__((always_inline)) { ahead(), ahead(); };
    for (int block = 0; block < 2; block += kPassBlocks) {
        Accumulators<RowType<bf16>, kRows, kPassBlocks> totals;
        bf16* kept[kPassBlocks];
        for (int n = 0; n < kPassBlocks; n++) kept[n] = unpacked[block + n];
        totals.load(from ? sums : kZeros, block);
        accumulate_packed<true>(totals, rows.at(m, from), rows.tile(), upper_bytes, packed + block, from, to, kept, prefetch_lines);
        totals.save(sums, block);
    }
#endif
}

// Several passes: a chunk of the inputs for all rows, whose weights stay in the first-level cache, then the next one. Each pass
// prefetches its share of the next chunk; the last chunk is followed by the first one of the next two blocks.
template <typename T>
class ChunkedPasses {
  public:
    ChunkedPasses(const Rows<T>& rows, const PackedWeights<T>& weights, int block, int blocks)
        : rows_(rows), weights_(weights), blocks_{block, block + blocks - 1} {
        if constexpr (sizeof(T) == sizeof(bf16))
            for (int n = 0; weights.packed() && n < 2; n++) packed_[n] = PackedBlock(weights, rows.inputs(), blocks_[n]);
    }

    // `more`: what is prefetched besides; may be null.
    void run(int first, int count, RowSums* sums, PrefetchList* more) {
        const int inputs = rows_.inputs(), chunk = equal_chunk(inputs, kChunkInputs);
        const int passes = (first % kRowsPerPass<T> + count + kRowsPerPass<T> - 1) / kRowsPerPass<T>;
        ListedPrefetch ahead{};
        for (int from = 0; from < inputs; from += chunk) {
            const int to = std::min(from + chunk, inputs);
            const bool last = to == inputs;
            if (more && !more->taken && (last || !more->late)) {
                ahead.next = more->ranges, ahead.last = more->ranges + more->count;
                more->taken = true;
            }
            ahead.from = begin(0, 2 * last, last ? 0 : to), ahead.other = begin(1, 2 * last, last ? 0 : to);
            // The steps of a pass that prefetch a block.
            const int steps = (to - from) / kLineInputs<T> / kPassBlocks;
            ahead.stride = ((last ? chunk : std::min(chunk, inputs - to)) * input_bytes() / steps + passes - 1) / passes;
            bool is_first = true;
            for_each_pass<kRowTile<T>, kRowsPerPass<T>>(first, count, [&](int m, auto number) {
                const char* const begins[2] = {ahead.from, ahead.other};
                run_pass<decltype(number)::value>(first + m, is_first, from, to, sums + m, ahead);
                is_first = false;
                ahead.from = begins[0] + steps * ahead.stride;
                ahead.other = begins[1] + steps * ahead.stride;
            });
        }
    }

  private:
    template <int kRows>
    void run_pass(int m, bool is_first, int from, int to, RowSums* sums, ListedPrefetch& ahead) {
        if constexpr (sizeof(T) == sizeof(bf16))
            if (weights_.packed()) {
                if (is_first) return unpack_chunk<kRows>(rows_, m, weights_.upper_bytes, packed_, unpacked_, from, to, sums, ahead);
                return accumulate_chunk<kRows, T>(rows_, m, {unpacked_[0], unpacked_[1]}, from, to, sums, ahead);
            }
        const T* const values[2] = {weights_.block(blocks_[0], rows_.inputs()), weights_.block(blocks_[1], rows_.inputs())};
        const size_t offset = (size_t)from * kVecSize;
        accumulate_chunk<kRows, T>(rows_, m, {values[0] + offset, values[1] + offset}, from, to, sums, ahead);
    }

    int input_bytes() const { return weights_.packed() ? kPackedTileBytes / kTileInputs : sizeof(T) * kVecSize; }

    // Where the weights of block blocks_[n] + skipped lie for this input and later ones.
    const char* begin(int n, int skipped, int input) const {
        const size_t row = (size_t)(blocks_[n] + skipped) * rows_.inputs() + input;
        return static_cast<const char*>(weights_.values) + row * input_bytes();
    }

    const Rows<T>& rows_;
    const PackedWeights<T>& weights_;
    const int blocks_[2];
    PackedBlock packed_[2];
    alignas(kCacheLine) UnpackedChunk unpacked_;
};
