// The rows of a step whose logits or hidden states are asked for: few of a prompt's. Once the last layer's keys and values are
// stored, the other rows change nothing, and the rest of the program runs for these alone.
//
// Layout: needed row j is row rows()[j] of the step, in ascending order; step() has the same arrays, of needed rows.
// ISA variants: none. Test: tests/inference/test_native.py (a row's logits are the same with and without the others).
// It knows no buffers or operations.
#pragma once

#include <algorithm>
#include <vector>

#include "program.hpp"
#include "step.hpp"

// The first operation that needed rows can run alone: after it no operation stores keys or values, or reads what Buffers::keep
// drops. `op_count` if there is none.
inline int first_op_of_needed_rows(const Program& program) {
    int first = program.op_count;
    while (first && program.ops[first - 1].kind != OpKind::kQkv && program.ops[first - 1].kind != OpKind::kRope) first--;
    bool attended = false, inner = false, mixed = false;
    for (int n = first; n < program.op_count; n++) {
        const Op& op = program.ops[n];
        attended |= op.kind == OpKind::kAttend;
        mixed |= op.kind == OpKind::kExperts;
        if (op.kind != OpKind::kMatmul) continue;
        const auto& matmul = *static_cast<const MatmulOp*>(op.arguments);
        const bool dropped = (matmul.from == Buffer::kAttended && !attended) || (matmul.from == Buffer::kInner && !inner);
        if (dropped || (matmul.row_scaled && !mixed)) return program.op_count;
        inner |= matmul.to == Buffer::kInner;
    }
    return first;
}

class NeededRows {
  public:
    // Whether the rest of the program shall run for the needed rows alone. Where most are needed, moving them does not pay.
    bool build(const Step& step) {
        index_.assign(step.rows, kDropped);
        for (int i = 0; i < step.logit_count; i++) index_[step.logit_rows[i]] = 0;
        for (int i = 0; i < step.hidden_count; i++) index_[step.hidden_rows[i]] = 0;
        rows_.clear();
        for (int row = 0; row < step.rows; row++) {
            if (index_[row] == kDropped) continue;
            index_[row] = (int)rows_.size();
            rows_.push_back(row);
        }
        if (2 * (int)rows_.size() > step.rows) return false;
        select(step);
        return true;
    }

    const std::vector<int>& rows() const { return rows_; }
    const Step& step() const { return step_; }

  private:
    static constexpr int kDropped = -1;

    void select(const Step& step) {
        step_ = step;
        step_.rows = (int)rows_.size();
        step_.ids = gather(ids_, step.ids);
        step_.positions = gather(positions_, step.positions);
        step_.sequences = gather(sequences_, step.sequences);
        step_.logit_rows = renumber(logit_rows_, step.logit_rows, step.logit_count);
        step_.hidden_rows = renumber(hidden_rows_, step.hidden_rows, step.hidden_count);
        adapter_rows_.clear();
        for (int n = 0; step.adapter_count && n <= step.adapter_count; n++)
            adapter_rows_.push_back((int)(std::lower_bound(rows_.begin(), rows_.end(), step.adapter_rows[n]) - rows_.begin()));
        step_.adapter_rows = adapter_rows_.data();
    }

    const int32_t* gather(std::vector<int32_t>& to, const int32_t* from) const {
        to.clear();
        for (int row : rows_) to.push_back(from[row]);
        return to.data();
    }

    const int32_t* renumber(std::vector<int32_t>& to, const int32_t* rows, int count) const {
        to.clear();
        for (int i = 0; i < count; i++) to.push_back(index_[rows[i]]);
        return to.data();
    }

    std::vector<int> rows_;
    // For each row of the step its index in rows_.
    std::vector<int32_t> index_;
    std::vector<int32_t> ids_, positions_, sequences_, logit_rows_, hidden_rows_, adapter_rows_;
    Step step_ = {};
};
