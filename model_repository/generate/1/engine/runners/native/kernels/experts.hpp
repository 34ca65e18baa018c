// Which rows go to which experts of a mixture, and with which weights: see ExpertsOp in program.hpp.
//   score[e] = router[e] . x + router_bias[e];  best: the top_k experts by score, equals by their number
//
// Layout: slot j of row r is its j-th best expert. Slots are sorted by expert; the rows of an expert are consecutive and begin
// at a multiple of 16, a tile's rows: slot_rows[r * top_k + j] is the slot's row among all experts' rows.
// A row's result does not depend on other rows. ISA variants: those of simd.hpp. Test: tests/inference/test_native_families.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "amx.hpp"
#include "program.hpp"
#include "rows.hpp"
#include "simd.hpp"

// The rows of one expert: `count` of them from row `first` on.
struct ExpertRows {
    int expert, first, count;
};

// Of one ExpertsOp and one step: a later layer does not overwrite it while a slow thread still reads it.
struct Routing {
    std::vector<float> scores, weights;
    // The sigmoid of the shared expert's gate, for each row.
    std::vector<float> shared_gates;
    std::vector<int> experts, slot_rows;
    std::vector<ExpertRows> used;

    // Experts of a work item: one row's scores of 128 experts are too much for one thread while the others wait.
    static constexpr int kExpertsPerItem = 16;

    // Room for the rows of all experts, whichever they are: a multiple of 16.
    static size_t padded_slots(const ExpertsOp& op, size_t rows) {
        const size_t slots = rows * op.top_k, most = slots + std::min<size_t>(op.experts, slots) * (kTileRows - 1);
        return (most + kTileRows - 1) / kTileRows * kTileRows;
    }

    static int items_per_row(const ExpertsOp& op) { return (op.experts + kExpertsPerItem - 1) / kExpertsPerItem; }

    void reserve(const ExpertsOp& op, size_t rows) {
        scores.resize(std::max(scores.size(), rows * op.experts));
        shared_gates.resize(std::max(shared_gates.size(), rows));
        for (auto* numbers : {&experts, &slot_rows}) numbers->resize(std::max(numbers->size(), rows * op.top_k));
        weights.resize(slot_rows.size());
        used.reserve(op.experts);
    }

    // A work item: the scores of 16 experts for one row.
    template <typename T>
    void score(const ExpertsOp& op, const Rows<T>& rows, int item) {
        const int row = item / items_per_row(op), first = item % items_per_row(op) * kExpertsPerItem;
        for (int expert = first; expert < std::min(first + kExpertsPerItem, op.experts); expert++) {
            const float bias = op.router_bias ? op.router_bias[expert] : 0;
            scores[(size_t)row * op.experts + expert] = dot(rows, row, op.router + (size_t)expert * rows.inputs()) + bias;
        }
        if (op.shared_gate && first == 0) shared_gates[row] = 1 / (1 + std::exp(-dot(rows, row, op.shared_gate)));
    }

    // The best experts of a row that has all its scores.
    void choose(const ExpertsOp& op, int row) {
        float* score = &scores[(size_t)row * op.experts];
        int* best = &experts[(size_t)row * op.top_k];
        float* weight = &weights[(size_t)row * op.top_k];
        if (!op.softmax_after) softmax(score, op.experts);
        for (int j = 0; j < op.top_k; j++) {
            best[j] = -1;
            for (int expert = 0; expert < op.experts; expert++)
                if (std::find(best, best + j, expert) == best + j && (best[j] < 0 || score[expert] > score[best[j]])) best[j] = expert;
            weight[j] = score[best[j]];
        }
        if (op.softmax_after) softmax(weight, op.top_k);
        if (!op.renormalize) return;
        float total = 0;
        for (int j = 0; j < op.top_k; j++) total += weight[j];
        for (int j = 0; j < op.top_k; j++) weight[j] /= total;
    }

    // After all rows have chosen: the place of each slot.
    void sort(const ExpertsOp& op, int rows) {
        std::vector<int> counts(op.experts);
        for (int slot = 0; slot < rows * op.top_k; slot++) counts[experts[slot]]++;
        used.clear();
        std::vector<int> next(op.experts);
        int first = 0;
        for (int expert = 0; expert < op.experts; expert++) {
            next[expert] = first;
            if (!counts[expert]) continue;
            used.push_back({expert, first, counts[expert]});
            first += (counts[expert] + kTileRows - 1) / kTileRows * kTileRows;
        }
        for (int slot = 0; slot < rows * op.top_k; slot++) slot_rows[slot] = next[experts[slot]]++;
    }

  private:
    template <typename T>
    static float dot(const Rows<T>& rows, int row, const float* weights) {
        Vec16 sums = {};
        for (int k = 0; k < rows.inputs(); k += kVecSize) sums += load(rows.at(row, k)) * load(weights + k);
        return reduce_add(sums);
    }

    static void softmax(float* numbers, int count) {
        const float most = *std::max_element(numbers, numbers + count);
        float total = 0;
        for (int i = 0; i < count; i++) total += numbers[i] = std::exp(numbers[i] - most);
        for (int i = 0; i < count; i++) numbers[i] /= total;
    }
};
