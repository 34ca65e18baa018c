// The weights that rows pass by: some inputs of one or two blocks of outputs at a time, so that they stay in the first
// cache meanwhile. It knows how weights lie, not what is computed with them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "lanes.hpp"
#include "tight.hpp"

// So many inputs of two blocks at a time, where rows come in several goes; where all of them come at once, nothing has to
// stay, and tight weights are expanded to so few.
constexpr int kNear = 384, kFew = 128;

// A product's weights: in tiles of twelve bits where `begins` says where each block's strays begin.
template <typename T>
struct Packed {
    const void* values;
    const Stray* strays;
    const int64_t* begins;
    CodeBook book;
};

// Tight weights are expanded when the first rows reach them, a little ahead: so the processor waits for memory and adds
// up in the same time.
template <typename T>
class Near {
  public:
    Near(const Packed<T>& packed, int inputs, int block, int blocks, bool once)
        : packed_(packed), inputs_(inputs), block_(block), blocks_(blocks), together_(once ? inputs : kNear),
          kept_(once && tight() ? kFew - 1 : kAll) {
        for (int n = 0; tight() && n < blocks; n++) strays_[n] = packed.strays + packed.begins[block + n];
    }

    // So many inputs pass by at a time.
    int together() const { return together_; }

    // The inputs from here to there come next.
    void begin(int from, int to) {
        from_ = ready_ = from;
        to_ = to;
        for (int n = 0; n < blocks_; n++)
            at_[n] = tight() ? wide_[n] : static_cast<const T*>(packed_.values) + place(n, from);
    }

    // From now on the tile that begins with this input is there, and one after the other those before what is returned.
    int reach(int input) {
        if (!tight()) return to_;
        for (const int end = std::min(input + kAhead, to_); ready_ < end; ready_ += kTileInputs)
            for (int n = 0; n < blocks_; n++) widen(n);
        const int there = ready_ == to_ ? to_ : input + kTileInputs, begins_again = from_ + ((input - from_) | kept_) + 1;
        return std::min(there, begins_again);
    }

    // Where a block's weights begin; and how far from there those of an input's tile lie.
    const T* block(int n) const { return at_[n]; }
    size_t offset(int input) const { return (size_t)((input - from_) & kept_) * kLanes; }

  private:
    static constexpr bool kCanBeTight = sizeof(T) == sizeof(bf16);
    static constexpr int kAhead = 3 * kTileInputs, kAll = (1 << 30) - 1;

    bool tight() const { return kCanBeTight && packed_.begins; }
    size_t place(int n, int input) const { return ((size_t)(block_ + n) * inputs_ + input) * kLanes; }

    void widen(int n) {
        if constexpr (kCanBeTight) {
            T* to = wide_[n] + offset(ready_);
            expand(static_cast<const uint8_t*>(packed_.values) + place(n, ready_) / 2 * 3, packed_.book, to);
            const uint32_t first = ready_ * kLanes;
            const Stray* end = packed_.strays + packed_.begins[block_ + n + 1];
            for (; strays_[n] < end && strays_[n]->place < first + kTileWeights; strays_[n]++)
                to[strays_[n]->place - first].bits = strays_[n]->bits;
        }
    }

    const Packed<T>& packed_;
    const int inputs_, block_, blocks_, together_;
    // Which bits of an input's number tell its place among those that are kept.
    const int kept_;
    int from_ = 0, to_ = 0, ready_ = 0;
    const T* at_[2];
    // Those that have not been met yet.
    const Stray* strays_[2];
    alignas(64) T wide_[2][kCanBeTight ? kNear * kLanes : 1];
};
