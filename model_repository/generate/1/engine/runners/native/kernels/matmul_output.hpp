// What becomes of a matmul's sums, 16 outputs of a row at a time: y = sums + bias + the row's adapter, then one of
//   kStore      to[row][column] = y
//   kAdd        to[row][column] += scale * y (* row_scales[row])
//   kActivate   rows[row][column] = activation(y)
//   kGate       rows[row][column / 2] = activation(gate) * up: 16 outputs of the gate precede the 16 of up
//   kQkv        queries into a buffer; keys and values into buffers, where there are such, or into the cache
//   kLogits     to[row][column] = softcap * tanh(scale * y / softcap)
// One type for all of them: gemm.hpp is compiled once.
// ISA variants: those of simd.hpp. Test: tests/inference/test_native_families.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

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

    void operator()(int row, int block, Vec16 sums) {
        const int column = block * kVecSize;
        if (bias) sums += load(bias + column);
        if (low_rank.adapters) sums += low_rank_sums(row, block);
        dispatch([&](auto constant) { this->template apply<decltype(constant)::value>(row, column, sums); });
    }

    // The same for all sums of a work item: sums[i][n] are those of row first + i and block + n.
    void write(int first, int count, int block, int blocks, const RowSums* sums) {
        if (low_rank.adapters) {
            for (int i = 0; i < count; i++)
                for (int n = 0; n < blocks; n++) (*this)(first + i, block + n, load(sums[i][n]));
            return;
        }
        dispatch([&](auto constant) { this->template write_rows<decltype(constant)::value>(first, count, block, blocks, sums); });
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
    // Calls `task` with the kind as a constant, so that loops over rows are compiled for each.
    template <typename Task>
    void dispatch(Task task) {
        switch (kind) {
            case OutputKind::kStore: return task(std::integral_constant<OutputKind, OutputKind::kStore>());
            case OutputKind::kAdd: return task(std::integral_constant<OutputKind, OutputKind::kAdd>());
            case OutputKind::kActivate: return task(std::integral_constant<OutputKind, OutputKind::kActivate>());
            case OutputKind::kGate: return task(std::integral_constant<OutputKind, OutputKind::kGate>());
            case OutputKind::kQkv: return task(std::integral_constant<OutputKind, OutputKind::kQkv>());
            case OutputKind::kLogits: return task(std::integral_constant<OutputKind, OutputKind::kLogits>());
        }
    }

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
    __attribute__((noinline)) void write_rows(int first, int count, int block, int blocks, const RowSums* sums) {
        const int column = block * kVecSize;
        Vec16 biases[2] = {};
        for (int n = 0; bias && n < blocks; n++) biases[n] = load(bias + column + n * kVecSize);
        for (int i = 0; i < count; i++)
            for (int n = 0; n < blocks; n++)
                apply<kKind>(first + i, column + n * kVecSize, bias ? load(sums[i][n]) + biases[n] : load(sums[i][n]));
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

template <typename T>
PrefetchList* list_reads(MatmulOutput<T>& output, int first, int count, int block, int blocks) {
    output.prefetch_reads(first, count, block, blocks);
    return &output.reads;
}

template <typename T>
void write_sums(MatmulOutput<T>& output, int first, int count, int block, int blocks, const RowSums* sums) {
    output.write(first, count, block, blocks, sums);
}
