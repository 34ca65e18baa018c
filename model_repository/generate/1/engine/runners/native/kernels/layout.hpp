// Where the cache's blocks keep keys and values, and where each row's own go. It knows nothing of scores.
//
// A block holds, head by head, its tokens' keys as [width][tokens] and their values as [tokens][width]: so one reads
// sixteen keys, or a value, side by side. Where AMX computes, two inputs of a sum lie side by side, as it reads them: keys
// as [width/2][tokens][2], values as [tokens/2][width][2].
#pragma once

#include <cstring>
#include <vector>

#include "lanes.hpp"
#include "rows.hpp"
#include "step.hpp"

template <typename T>
class Layout {
  public:
    // Sixteen numbers of a row's key, or of its value; columns go through all heads.
    void keep_key(T* keys, int row, int column, Lanes found) const {
        const int token = step_->places[row] % tokens_;
        T sixteen[kLanes];
        store(sixteen, found);
        if (in_tiles_) {
            T* to = keys + own_[row] + (size_t)column * tokens_ + 2 * token;
            for (int lane = 0; lane < kLanes; lane += 2) memcpy(to + lane * tokens_, sixteen + lane, 2 * sizeof(T));
            return;
        }
        T* to = keys + own_[row] + (size_t)column * tokens_ + token;
        for (int lane = 0; lane < kLanes; lane++) to[(size_t)lane * tokens_] = sixteen[lane];
    }

    void keep_value(T* values, int row, int column, Lanes found) const {
        const int token = step_->places[row] % tokens_, head = column / width_, inside = column % width_;
        T* of_head = values + own_[row] + (size_t)head * tokens_ * width_;
        if (!in_tiles_) return store(of_head + (size_t)token * width_ + inside, found);
        T sixteen[kLanes];
        store(sixteen, found);
        T* to = of_head + ((size_t)(token / 2) * width_ + inside) * 2 + token % 2;
        for (int lane = 0; lane < kLanes; lane++) to[2 * lane] = sixteen[lane];
    }

  protected:
    Layout(int heads, int shared, int width) : heads_(heads), shared_(shared), width_(width) {}

    void begin(const Step& step) {
        step_ = &step;
        tokens_ = step.block_tokens;
        in_tiles_ = tiles_compute<T>() && width_ % 32 == 0 && tokens_ % kLanes == 0;
        block_ = (size_t)heads_ / shared_ * width_ * tokens_;
        own_.resize(step.rows);
        for (int row = 0; row < step.rows; row++) own_[row] = table_of(row)[step.places[row] / tokens_] * block_;
    }

    const int32_t* table_of(int row) const {
        return step_->tables + (size_t)step_->sequences[row] * step_->table_width;
    }

    // Where a head's keys, or values, begin in a block.
    size_t in_block(int head) const { return (size_t)(head / shared_) * width_ * tokens_; }

    // So many heads of queries share one of keys and values.
    const int heads_, shared_, width_;
    const Step* step_ = nullptr;
    int tokens_ = 0;
    bool in_tiles_ = false;
    // Numbers in a block of the cache.
    size_t block_ = 0;

  private:
    // The block that each row's own key and value go to.
    std::vector<size_t> own_;
};
