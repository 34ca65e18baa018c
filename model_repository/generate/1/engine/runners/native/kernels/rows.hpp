// Rows that go into a product. Where tiles read them, they lie tile by tile, [rows/16][inputs/32][16][32] in bfloat16: a
// tile is one piece of memory, which the processor sees coming. Elsewhere each row is one piece. Nothing here knows of
// weights.
#pragma once

#include <cstddef>

#include "lanes.hpp"
#include "tiles.hpp"

template <typename T>
bool tiles_compute() {
    return sizeof(T) == sizeof(bf16) && tiles_are_ours();
}

// Rows of bfloat16 are floats where no instruction computes with bfloat16: so nobody widens them again and again.
#ifdef __AVX512BF16__
template <typename T>
using RowOf = T;
#else
template <typename T>
using RowOf = float;
#endif

template <typename T>
class Rows {
  public:
    typedef RowOf<T> Number;

    // In tiles: a multiple of sixteen rows.
    void reserve(size_t rows, int inputs, bool in_tiles) {
        inputs_ = inputs;
        to_next_row_ = in_tiles ? kLine : inputs;
        to_next_line_ = in_tiles ? kLine * kTileRows : kLine;
        numbers_.resize(rows * inputs);
    }

    // Sixteen numbers of a row lie side by side here, and the whole row where it is one piece.
    Number* at(size_t row, size_t column = 0) { return &numbers_[place(row, column)]; }
    const Number* at(size_t row, size_t column = 0) const { return &numbers_[place(row, column)]; }
    int inputs() const { return (int)inputs_; }

  private:
    static constexpr size_t kLine = 64 / sizeof(Number);

    size_t place(size_t row, size_t column) const {
        const size_t tile = row / kTileRows * kTileRows * inputs_ + column / kLine * to_next_line_;
        return tile + row % kTileRows * to_next_row_ + column % kLine;
    }

    size_t inputs_ = 0, to_next_row_ = 0, to_next_line_ = 0;
    Numbers<Number> numbers_;
};
