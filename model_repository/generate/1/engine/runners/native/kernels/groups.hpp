// Which rows of a step are attended together: those that read the same keys and values. It knows blocks' numbers, not
// what lies in them.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "step.hpp"

// Rows that follow one another in a sequence; or the last rows of several, whose first blocks are the same ones: a
// prompt they share, once computed, is also read once.
struct Group {
    int first, count;
    // So many blocks from the start are the same for all; beyond, each reads its own.
    int shared;
    bool one_sequence;
};

class Groups {
  public:
    // At most `run` rows of a sequence go together, and at most `most` of different ones.
    void find(const Step& step, int run, int most) {
        groups_.clear();
        rows_.clear();
        single_.clear();
        for (int row = 0, count; row < step.rows; row += count) {
            count = 1;
            while (row + count < step.rows && count < run && step.sequences[row + count] == step.sequences[row]) count++;
            if (count == 1) {
                single_.push_back(row);
                continue;
            }
            groups_.push_back({(int)rows_.size(), count, kAll, true});
            for (int n = 0; n < count; n++) rows_.push_back(row + n);
        }
        share(step, most);
    }

    int size() const { return (int)groups_.size(); }
    const Group& operator[](int i) const { return groups_[i]; }
    const int* rows(const Group& group) const { return &rows_[group.first]; }

  private:
    static constexpr int kAll = std::numeric_limits<int>::max();

    // The blocks before the one that a row's own key goes to.
    static const int32_t* begin(const Step& step, int row) {
        return step.tables + (size_t)step.sequences[row] * step.table_width;
    }
    static const int32_t* end(const Step& step, int row) { return begin(step, row) + step.places[row] / step.block_tokens; }

    static int common(const Step& step, int one, int other) {
        const int32_t* from = begin(step, one);
        return (int)(std::mismatch(from, end(step, one), begin(step, other), end(step, other)).first - from);
    }

    // In the order of their blocks, those who share most stand beside each other.
    void share(const Step& step, int most) {
        std::sort(single_.begin(), single_.end(), [&](int one, int other) {
            return std::lexicographical_compare(begin(step, one), end(step, one), begin(step, other), end(step, other));
        });
        bool open = false;
        for (int row : single_) {
            if (open) {
                Group& last = groups_.back();
                const int both = std::min(last.shared, common(step, rows_.back(), row));
                // Who shares little more than the beginning would leave the others little to share.
                if (both && last.count < most && (last.count == 1 || 2 * both >= last.shared)) {
                    last.count++;
                    last.shared = both;
                    rows_.push_back(row);
                    continue;
                }
            }
            open = true;
            groups_.push_back({(int)rows_.size(), 1, kAll, true});
            rows_.push_back(row);
        }
        for (Group& group : groups_) group.one_sequence = group.shared == kAll;
    }

    std::vector<Group> groups_;
    std::vector<int> rows_, single_;
};
