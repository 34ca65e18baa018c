// A mixture of experts (ExpertsOp in program.hpp), for the rows of a step: route, gather each expert's rows, up, down, combine.
//   to[r] += scale * sum over j of p[r][j] * down[e](activation(gate[e] x[r]) * up[e] x[r]), e = the j-th best expert of row r
//
// Layout: experts.hpp. Slots are summed in the order of their scores. ISA variants: those of multiply.hpp.
// Test: tests/inference/test_native_families.py.
#pragma once

#include <vector>

#include "experts.hpp"
#include "matmul_output.hpp"
#include "multiply.hpp"
#include "program.hpp"
#include "rows.hpp"
#include "thread_pool.hpp"

template <typename T>
class Mixture {
  public:
    enum Stage { kScore, kChoose, kSort, kGather, kUp, kDown, kCombine, kStages };

    Mixture(const ExpertsOp& op, int hidden_size) : op_(op), hidden_size_(hidden_size) {}

    // Shared by all mixtures of a program, whose experts have one size.
    struct Scratch {
        Rows<T> gathered, inner;
        AlignedVector<float> outputs;

        void reserve(size_t slots, int hidden_size, int inner_size, RowLayout layout) {
            gathered.begin((int)slots, hidden_size, layout);
            inner.begin((int)slots, inner_size, layout);
            outputs.resize(slots * hidden_size);
        }
    };

    void reserve(size_t rows) { routing_.reserve(op_, rows); }
    size_t slots(size_t rows) const { return Routing::padded_slots(op_, rows); }
    int inner_size() const { return op_.down->inputs; }
    const float* shared_gates() const { return routing_.shared_gates.data(); }

    // Adds the experts' sum to `to`, [rows][hidden_size], or stores it. All threads call it.
    void run(const Rows<T>& rows, int count, float* to, Scratch& scratch, Multiplier<T>& multiplier, MatmulQueues* queues) {
        const int width = hidden_size_, top_k = op_.top_k;
        queues[kScore].items.for_each(count * Routing::items_per_row(op_), [&](int i) { routing_.score(op_, rows, i); });
        queues[kChoose].items.for_each(count, [&](int row) { routing_.choose(op_, row); });
        queues[kSort].items.for_each(1, [&](int) { routing_.sort(op_, count); });
        queues[kGather].items.for_each(count * top_k, [&](int slot) {
            for (int k = 0; k < width; k += kVecSize)
                store(scratch.gathered.at(routing_.slot_rows[slot], k), load(rows.at(slot / top_k, k)));
        });
        multiplier.multiply_experts(scratch.gathered, routing_.used, op_.up, queues[kUp], [&](const Weights& weights) {
            MatmulOutput<T> output{OutputKind::kGate, weights.bias};
            output.rows = &scratch.inner;
            output.activation = op_.activation;
            return output;
        });
        multiplier.multiply_experts(scratch.inner, routing_.used, op_.down, queues[kDown], [&](const Weights& weights) {
            MatmulOutput<T> output{OutputKind::kStore, weights.bias, (size_t)width};
            output.to = scratch.outputs.data();
            return output;
        });
        queues[kCombine].items.for_each(count, [&](int row) { combine(row, to + (size_t)row * width, scratch); });
    }

  private:
    void combine(int row, float* to, const Scratch& scratch) const {
        for (int k = 0; k < hidden_size_; k += kVecSize) {
            Vec16 sum = {};
            for (int slot = row * op_.top_k; slot < (row + 1) * op_.top_k; slot++)
                sum += routing_.weights[slot] * load(&scratch.outputs[(size_t)routing_.slot_rows[slot] * hidden_size_ + k]);
            store(to + k, op_.add ? load(to + k) + op_.scale * sum : op_.scale * sum);
        }
    }

    const ExpertsOp& op_;
    const int hidden_size_;
    Routing routing_;
};
