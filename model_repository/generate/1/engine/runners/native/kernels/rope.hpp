// RoPE: rotates queries and keys by their positions. With h = table.half, for d in [0, h):
//   x[d], x[d + h] -> x[d] c - x[d + h] s, x[d + h] c + x[d] s;  c, s = factor * cos, sin(position * inv_freq[d])
// Dimensions from 2 h on, and those of a frequency of 0, do not rotate and are not multiplied. Pairs that lie otherwise in a
// checkpoint (interleaved, or fewer than half a vector) are put into this order while weights are loaded (rope.py).
//
// Layout: cosines and sines are [table][row][2 h], cosines first.
// ISA variants: those of simd.hpp. Test: tests/inference/test_native_families.py.
#pragma once

#include <cmath>
#include <vector>

#include "normalize.hpp"
#include "program.hpp"
#include "simd.hpp"

class Rope {
  public:
    explicit Rope(const Program& program) : tables_(program.tables, program.tables + program.table_count) {}

    void reserve(size_t rows) {
        size_t size = 0;
        begin_.clear();
        for (const RopeTable& table : tables_) begin_.push_back(size), size += rows * 2 * table.half;
        cos_sin_.resize(size);
    }

    // Before the layers, for each row.
    void compute(int row, int position) {
        for (size_t n = 0; n < tables_.size(); n++) {
            const RopeTable& table = tables_[n];
            float* to = &cos_sin_[begin_[n] + (size_t)row * 2 * table.half];
            for (int i = 0; i < table.half; i++) {
                const float angle = position * table.inv_freq[i], factor = table.inv_freq[i] == 0 ? 1 : table.factor;
                to[i] = factor * std::cos(angle);
                to[table.half + i] = factor * std::sin(angle);
            }
        }
    }

    // One head of a row, normed before by the norm of this number; `norm` is that of the first head. Not inlined: compiled once.
    __attribute__((noinline)) void rotate(const RopeOp& op, Norm norm, int number, int row, float* head, int head_dim) const {
        if (norm.kind != NormKind::kNone) {
            if (norm.weight) norm.weight += number * op.norm_stride;
            if (norm.bias) norm.bias += number * op.norm_stride;
            normalize(norm, head, head_dim, [&](int k, Vec16 values) { store(head + k, values); });
        }
        if (op.table >= 0) rotate(op.table, row, head);
    }

  private:
    void rotate(int number, int row, float* head) const {
        const int half = tables_[number].half;
        const float* cos_sin = &cos_sin_[begin_[number] + (size_t)row * 2 * half];
        for (int k = 0; k < half; k += kVecSize) {
            const Vec16 cosines = load(cos_sin + k), sines = load(cos_sin + half + k);
            const Vec16 first = load(head + k), second = load(head + half + k);
            store(head + k, first * cosines - second * sines);
            store(head + half + k, second * cosines + first * sines);
        }
    }

    const std::vector<RopeTable> tables_;
    std::vector<size_t> begin_;
    AlignedVector<float> cos_sin_;
};
