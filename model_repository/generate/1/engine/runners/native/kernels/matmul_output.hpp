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

#include "activation.hpp"
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
        switch (kind) {
            case OutputKind::kStore: return store(to + row * stride + column, sums);
            case OutputKind::kAdd: return add(row, to + row * stride + column, sums);
            case OutputKind::kActivate: return store(rows->at(row, column), activate(activation, sums));
            case OutputKind::kGate: return store_gated(row, column, sums);
            case OutputKind::kQkv: return store_qkv(row, column, sums);
            case OutputKind::kLogits: return store_logits(to + row * stride + column, sums);
        }
    }

  private:
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
    output.reads.clear();
    if (output.low_rank.adapters) output.low_rank.list_reads(first, count, block, blocks, output.reads);
    return &output.reads;
}
