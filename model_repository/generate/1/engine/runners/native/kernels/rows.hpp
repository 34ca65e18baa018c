// The activation rows that go into a matmul: Rows<T>, a matrix [rows][inputs].
//
// Layout: tiles of the rows that are multiplied together, as in AMX's registers: x[r][k] lies at
//   [r / tile][k / line][r % tile][k % line], a line being 64 bytes: 32 inputs in bfloat16, 16 in float32.
// A tile is contiguous memory, which the hardware prefetcher follows, and its rows lie at constant distances from each other.
// Rows that are only quantized (int8.hpp) are contiguous: x[r][k] at r * inputs + k.
// ISA variants: tiles of 16 rows for AMX; of 12 rows with AVX-512, and of 6 rows otherwise (gemm.hpp), or of few rows. Without
// __AVX512BF16__ no instruction reads bfloat16, and rows of bfloat16 are stored as float32: they are converted once, not in
// each matmul. Test: tests/inference/test_native.py. It knows no weights.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

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

// Rows that one pass without AMX accumulates at most: their sums fit the registers, beside their operands.
constexpr int kPassRows = kAccumulators == 16 ? 12 : 6;

// Rows of a tile, and those of a pass within it.
#ifdef __AMX_BF16__
template <typename T>
constexpr int kRowTile = sizeof(T) == sizeof(bf16) ? kTileRows : kPassRows;
#else
template <typename T>
constexpr int kRowTile = kPassRows;
#endif
template <typename T>
constexpr int kRowsPerPass = kRowTile<T> == kPassRows ? kPassRows : kRowTile<T> / 2;

// Numbers of a line.
template <typename Number>
constexpr int kRowLine = kCacheLine / sizeof(Number);

// The rows of the smallest pass for `count` rows: 1, 2, 4, 8, or `most`. A tile holds all rows of a pass, of which those
// beyond `count` are undefined.
inline int pass_rows(int count, int most) {
    int rows = 1;
    while (rows < count && rows < most) rows *= 2;
    return std::min(rows, most);
}

enum class RowLayout { kTiles, kContiguous };

template <typename T>
class Rows {
  public:
    typedef RowType<T> Number;

    // Lays out this many rows, whose numbers are undefined then. Few rows have a smaller tile: a row's lines are closer.
    void begin(int rows, int inputs, RowLayout layout) {
        inputs_ = inputs;
        layout_ = layout;
        tile_ = kTile == kTileRows ? kTile : pass_rows(rows, kTile);
        numbers_.resize(std::max(numbers_.size(), (rows + kTile - 1) / kTile * kTile * inputs));
    }

    // Lays out these rows, in ascending order, as rows 0, 1, ….
    void keep(const std::vector<int>& kept) {
        AlignedVector<Number> numbers(kept.size() * inputs_);
        const auto copy_all = [&](auto copy) {
            for (size_t n = 0; n < kept.size(); n++)
                for (size_t k = 0; k < inputs_; k += kVecSize) copy(&numbers[n * inputs_ + k], n, k);
        };
        copy_all([&](Number* copied, size_t n, size_t k) { store(copied, load(at(kept[n], k))); });
        begin((int)kept.size(), (int)inputs_, layout_);
        copy_all([&](Number* copied, size_t n, size_t k) { store(at(n, k), load(copied)); });
    }

    // Numbers of a line are contiguous from here; in the contiguous layout, those of the whole row are.
    Number* at(size_t row, size_t column = 0) { return &numbers_[index_of(row, column)]; }
    const Number* at(size_t row, size_t column = 0) const { return &numbers_[index_of(row, column)]; }
    // From a line of a row to the next one, in numbers.
    size_t line_stride() const { return layout_ == RowLayout::kContiguous ? kLine : kLine * tile_; }
    int inputs() const { return (int)inputs_; }
    int tile() const { return tile_; }

  private:
    static constexpr size_t kTile = kRowTile<T>, kLine = kRowLine<Number>;

    size_t index_of(size_t row, size_t column) const {
        if (layout_ == RowLayout::kContiguous) return row * inputs_ + column;
        return row / kTile * kTile * inputs_ + column / kLine * kLine * tile_ + row % kTile * kLine + column % kLine;
    }

    size_t inputs_ = 0;
    int tile_ = kTile;
    RowLayout layout_ = RowLayout::kTiles;
    AlignedVector<Number> numbers_;
};
