// What becomes of a matmul's sums, 16 outputs of a row at a time: y = sums + bias + the row's adapter, then one of
//   kStore      to[row][column] = y
//   kAdd        to[row][column] += scale * y (* row_scales[row])
//   kActivate   rows[row][column] = activation(y)
//   kGate       rows[row][column / 2] = activation(gate) * up: 16 outputs of the gate precede the 16 of up
//   kQkv        queries into a buffer; keys and values into buffers, where there are such, or into the cache
//   kLogits     to[row][column] = softcap * tanh(scale * y / softcap)
// One type for all of them: multiply.hpp is compiled once.
// ISA variants: those of simd.hpp. Test: tests/inference/test_native_families.py.
#pragma once

#include <algorithm>
#include <cstddef>

#include "activation.hpp"
#include "fma.hpp"
#include "kv_layout.hpp"
#include "low_rank_term.hpp"
#include "prefetch.hpp"
#include "program.hpp"
#include "rows.hpp"

enum class OutputKind { kStore, kAdd, kActivate, kGate, kQkv, kLogits };

template <typename T>
struct MatmulOutput {
    OutputKind kind;
    const float* bias;
    // Of `to`, and of `keys` and `values`, in floats.
    size_t stride = 0, key_stride = 0;
    float *to = nullptr, *keys = nullptr, *values = nullptr;
    Rows<T>* rows = nullptr;
    const float* row_scales = nullptr;
    Activation activation = Activation::kNone;
    float scale = 1, clip = 0, softcap = 0;
    // kQkv: queries are stride columns, keys key_stride ones.
    const KVLayout<T>* layout = nullptr;
    T *key_cache = nullptr, *value_cache = nullptr;
    LowRankTerm<T> low_rank = {};
    typename LowRankTerm<T>::Group group;
    PrefetchList reads;
    Vec16 gate = {};

    // Of a work item: sums[i][n] are those of row first + i and block + n. They may be overwritten.
    void write(int first, int count, int block, int blocks, RowSums* sums) {
        const float* added = bias;
        // A loop of its own: those of the kinds are compiled once.
        if (low_rank.adapters) add_low_rank(first, count, block, blocks, sums), added = nullptr;
        switch (kind) {
            case OutputKind::kStore: return write_rows<OutputKind::kStore>(first, count, block, blocks, sums, added);
            case OutputKind::kAdd: return write_rows<OutputKind::kAdd>(first, count, block, blocks, sums, added);
            case OutputKind::kActivate: return write_rows<OutputKind::kActivate>(first, count, block, blocks, sums, added);
            case OutputKind::kGate: return write_rows<OutputKind::kGate>(first, count, block, blocks, sums, added);
            case OutputKind::kQkv: return write_rows<OutputKind::kQkv>(first, count, block, blocks, sums, added);
            case OutputKind::kLogits: return write_rows<OutputKind::kLogits>(first, count, block, blocks, sums, added);
        }
    }

    // Memory that is read when the sums of these rows and blocks are complete: prefetched now, or listed for passes.
    void prefetch_reads(int first, int count, int block, int blocks) {
        reads.clear();
        const size_t bytes = blocks * kVecSize * sizeof(float);
        if (bias) prefetch_lines(bias + block * kVecSize, bytes);
        if (low_rank.adapters) return low_rank.list_reads(first, count, block, blocks, reads);
        // AMX's passes prefetch no lists.
        if (kind != OutputKind::kAdd || uses_amx<T>()) return;
        reads.late = true;
        for (int row = first; row < first + count; row++) {
            const float* const target = to + row * stride + block * kVecSize;
            if (count <= kPassRows) prefetch_lines(target, bytes);
            else reads.add((const char*)target, bytes);
        }
    }

  private:
    template <OutputKind kKind>
    void apply(int row, int column, Vec16 sums) {
        if constexpr (kKind == OutputKind::kStore) store(to + row * stride + column, sums);
        if constexpr (kKind == OutputKind::kAdd) add(row, to + row * stride + column, sums);
        if constexpr (kKind == OutputKind::kActivate) store(rows->at(row, column), activate(activation, sums));
        if constexpr (kKind == OutputKind::kGate) store_gated(row, column, sums);
        if constexpr (kKind == OutputKind::kQkv) store_qkv(row, column, sums);
        if constexpr (kKind == OutputKind::kLogits) store_logits(to + row * stride + column, sums);
    }

    template <OutputKind kKind>
    __attribute__((noinline)) void write_rows(
        int first, int count, int block, int blocks, const RowSums* sums, const float* added
    ) {
        const int column = block * kVecSize;
        Vec16 biases[2] = {};
        for (int n = 0; added && n < blocks; n++) biases[n] = load(added + column + n * kVecSize);
        for (int i = 0; i < count; i++)
            for (int n = 0; n < blocks; n++)
                apply<kKind>(first + i, column + n * kVecSize, added ? load(sums[i][n]) + biases[n] : load(sums[i][n]));
    }

    // Adds the bias and the rows' adapters.
    __attribute__((noinline)) void add_low_rank(int first, int count, int block, int blocks, RowSums* sums) {
        for (int i = 0; i < count; i++)
            for (int n = 0; n < blocks; n++) {
                Vec16 total = load(sums[i][n]);
                if (bias) total += load(bias + (block + n) * kVecSize);
                store(sums[i][n], total + low_rank_sums(first + i, block + n));
            }
    }

    static void prefetch_lines(const float* from, size_t bytes) {
        // See PagedTokens::prefetch.
        asm volatile("");
        for (size_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch((const char*)from + byte, 0, 3);
    }

    // A work item's results come row by row, and a row's blocks one after the other.
    Vec16 low_rank_sums(int row, int block) {
        constexpr int kRows = LowRankTerm<T>::kGroupRows;
        if (row % kRows == 0 && block % 2 == 0) low_rank.compute(row, block, !reads.taken, group);
        return load(group.sums[row % kRows][block % 2]);
    }

    void add(int row, float* target, Vec16 sums) const {
        store(target, load(target) + sums * (row_scales ? scale * row_scales[row] : scale));
    }

    // Both halves are of one pair of blocks: they come one after the other.
    void store_gated(int row, int column, Vec16 sums) {
        if (column % (2 * kVecSize) == 0) gate = sums;
        else store(rows->at(row, column / (2 * kVecSize) * kVecSize), activate_gated(activation, gate, sums));
    }

    void store_qkv(int row, int column, Vec16 sums) const {
        if (clip > 0) sums = min(max(sums, -clip), clip);
        if (column < (int)stride) return store(to + row * stride + column, sums);
        column -= (int)stride;
        if (column >= (int)key_stride) return store_value(row, column - (int)key_stride, sums);
        if (keys) return store(keys + row * key_stride + column, sums);
        layout->store_key(key_cache, row, column, sums);
    }

    void store_value(int row, int column, Vec16 sums) const {
        if (values) return store(values + row * key_stride + column, sums);
        layout->store_value(value_cache, row, column, sums);
    }

    void store_logits(float* target, Vec16 sums) const {
        const Vec16 scaled = sums * scale;
        store(target, softcap > 0 ? softcap * tanh(scaled / softcap) : scaled);
    }
};
