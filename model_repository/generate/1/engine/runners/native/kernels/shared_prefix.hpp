// Groups the rows of a step that read the same keys and values, so that attention reads these once for the group:
// consecutive rows of one sequence (a prompt's chunk), or the last rows of several sequences whose block tables begin with
// the same blocks (a shared prefix).
//
// Layout: the rows of group g are rows_[g.first] to rows_[g.first + g.count - 1].
// ISA variants: none. Test: tests/inference/test_native.py (rows that share a prefix). It knows block numbers, not their
// contents.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "step.hpp"

struct RowGroup {
    int first, count;
    // The blocks from the start that all rows have in common.
    int shared_blocks;
    bool one_sequence;
};

class RowGroups {
  public:
    // A group holds at most `max_chunk` rows of one sequence, or `max_sequences` rows of different ones.
    void build(const Step& step, int max_chunk, int max_sequences) {
        groups_.clear();
        rows_.clear();
        single_.clear();
        for (int row = 0, count; row < step.rows; row += count) {
            count = 1;
            while (row + count < step.rows && count < max_chunk && step.sequences[row + count] == step.sequences[row]) count++;
            if (count == 1) {
                single_.push_back(row);
                continue;
            }
            groups_.push_back({(int)rows_.size(), count, kAllBlocks, true});
            for (int n = 0; n < count; n++) rows_.push_back(row + n);
        }
        group_by_prefix(step, max_sequences);
    }

    int size() const { return (int)groups_.size(); }
    const RowGroup& operator[](int i) const { return groups_[i]; }
    const int* rows(const RowGroup& group) const { return &rows_[group.first]; }

  private:
    static constexpr int kAllBlocks = std::numeric_limits<int>::max();

    // The full blocks before the one that receives the row's own key.
    static const int32_t* begin(const Step& step, int row) {
        return step.block_tables + (size_t)step.sequences[row] * step.table_width;
    }
    static const int32_t* end(const Step& step, int row) { return begin(step, row) + step.positions[row] / step.block_tokens; }

    static int common_blocks(const Step& step, int one, int other) {
        const int32_t* from = begin(step, one);
        return (int)(std::mismatch(from, end(step, one), begin(step, other), end(step, other)).first - from);
    }

    // Sorts the rows by their block tables: those with the longest common prefix become neighbours.
    void group_by_prefix(const Step& step, int max_sequences) {
        std::sort(single_.begin(), single_.end(), [&](int one, int other) {
            return std::lexicographical_compare(begin(step, one), end(step, one), begin(step, other), end(step, other));
        });
        bool open = false;
        for (int row : single_) {
            if (open) {
                RowGroup& last = groups_.back();
                const int common = std::min(last.shared_blocks, common_blocks(step, rows_.back(), row));
                // A row that would cut the group's common prefix to less than half starts a group of its own.
                if (common && last.count < max_sequences && (last.count == 1 || 2 * common >= last.shared_blocks)) {
                    last.count++;
                    last.shared_blocks = common;
                    rows_.push_back(row);
                    continue;
                }
            }
            open = true;
            groups_.push_back({(int)rows_.size(), 1, kAllBlocks, true});
            rows_.push_back(row);
        }
        for (RowGroup& group : groups_) group.one_sequence = group.shared_blocks == kAllBlocks;
    }

    std::vector<RowGroup> groups_;
    std::vector<int> rows_, single_;
};
