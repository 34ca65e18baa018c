// The activation rows that go into a matmul: Rows<T>, a matrix [rows][inputs].
//
// Layout: x[r][k] lies at r * inputs + k; for AMX at [r / 16][k / 32][r % 16][k % 32] in bfloat16, so that a tile is 1 KiB of
// contiguous memory, which the hardware prefetcher follows.
// ISA variants: AMX layout where __AMX_BF16__ is defined and the system grants tiles. Without __AVX512BF16__ no instruction
// reads bfloat16, and rows of bfloat16 are stored as float32: they are converted once, not in each matmul.
// Test: tests/inference/test_native.py. It knows no weights.
#pragma once

#include <cstddef>

#include "amx.hpp"
#include "simd.hpp"

template <typename T>
bool uses_amx() {
    return sizeof(T) == sizeof(bf16) && amx_available();
}

#ifdef __AVX512BF16__
template <typename T>
using RowType = T;
#else
template <typename T>
using RowType = float;
#endif

template <typename T>
class Rows {
  public:
    typedef RowType<T> Number;

    // With `amx_layout`, `rows` is a multiple of 16.
    void reserve(size_t rows, int inputs, bool amx_layout) {
        inputs_ = inputs;
        row_stride_ = amx_layout ? kLine : inputs;
        line_stride_ = amx_layout ? kLine * kTileRows : kLine;
        numbers_.resize(rows * inputs);
    }

    // 16 numbers from here are contiguous; without the AMX layout, the whole row is.
    Number* at(size_t row, size_t column = 0) { return &numbers_[index_of(row, column)]; }
    const Number* at(size_t row, size_t column = 0) const { return &numbers_[index_of(row, column)]; }
    int inputs() const { return (int)inputs_; }

  private:
    // Numbers in a cache line, which is a tile's row.
    static constexpr size_t kLine = kCacheLine / sizeof(Number);

    size_t index_of(size_t row, size_t column) const {
        const size_t tile = row / kTileRows * kTileRows * inputs_ + column / kLine * line_stride_;
        return tile + row % kTileRows * row_stride_ + column % kLine;
    }

    size_t inputs_ = 0, row_stride_ = 0, line_stride_ = 0;
    AlignedVector<Number> numbers_;
};
