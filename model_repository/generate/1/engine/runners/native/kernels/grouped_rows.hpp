// Activation rows in int8 for weights in groups. Over each group of 32 inputs
//   x = scale * xq + middle,  scale = (max x - min x) / 254,  middle = (max x + min x) / 2
// One-sided groups, which are usual, have half of the error that a scale of max |x| / 127 gives.
//
// Layout: tiles of rows that are multiplied together, [row / tile][group], each:
//   [row % tile][32] numbers in int8; then [5][row % tile] in float32: scale, middle, and sums of the quantized x: of the first
//   16, of the other 16, of all 32
// So what a group's rows have of each lies side by side, and a tile of AMX begins at a cache line.
// Inputs are padded with zeros to a multiple of 256.
// ISA variants: those of simd.hpp; a tile has 16 rows for AMX, 12 with AVX-512 and 4 otherwise, or fewer for few rows.
// Test: tests/inference/test_grouped.py. It knows no weights.
#pragma once

#include <algorithm>
#include <cstddef>

#include "amx.hpp"
#include "grouped_form.hpp"
#include "rows.hpp"
#include "simd.hpp"

// Inputs of a group of a row, and rows of a pass at most.
constexpr int kRowGroup = 32, kGroupedPassRows = kAccumulators == 16 ? 12 : 4;
#ifdef __AMX_BF16__
constexpr int kGroupedTile = kTileRows, kGroupedRowsPerPass = 8;
#else
constexpr int kGroupedTile = kGroupedPassRows, kGroupedRowsPerPass = kGroupedPassRows;
#endif

inline int padded_to_super(int inputs) { return (inputs + kSuperInputs - 1) / kSuperInputs * kSuperInputs; }

// A group of the rows from one on, in their tile.
struct Int8Group {
    enum Field { kScale, kMiddle, kFirstSum, kSecondSum, kSum, kFields };
    // Of a row.
    static constexpr int kBytes = kRowGroup + kFields * sizeof(float);
    int8_t* numbers;
    float* fields;
    int tile;

    int8_t* row(int i) const { return numbers + i * kRowGroup; }
    float& field(Field field, int i) const { return fields[field * tile + i]; }
    // Of the rows that follow in each group.
    Int8Group skip_rows(int rows) const { return {row(rows), fields + rows, tile}; }
    // The group that many groups later.
    Int8Group skip_groups(int count) const {
        const int bytes = count * tile * kBytes;
        return {numbers + bytes, fields + bytes / sizeof *fields, tile};
    }
};

class GroupedRows {
  public:
    void reserve(size_t rows, int inputs) {
        const size_t tiles = (rows + kGroupedTile - 1) / kGroupedTile;
        bytes_.resize(std::max(bytes_.size(), tiles * (padded_to_super(inputs) / kRowGroup) * kGroupedTile * Int8Group::kBytes));
    }

    // The rows of a tile, for this many rows.
    static int tile_for(int rows) { return pass_rows(rows, kGroupedTile); }

    template <typename T>
    void quantize(const Rows<T>& from, int row, int tile) {
        const int inputs = from.inputs(), padded = padded_to_super(inputs);
        for (int k = 0; k < padded; k += kRowGroup) {
            Vec16 halves[2] = {};
            for (int half = 0; half < 2; half++)
                if (const int column = k + half * kVecSize; column < inputs) halves[half] = load(from.at(row, column));
            quantize_group(halves, group(row, inputs, k, tile));
        }
    }

    // Of the group of inputs from k on; one type for `quantize`, which writes, and for matmuls, which read.
    Int8Group group(int row, int inputs, int k, int tile) const {
        const size_t number = (size_t)(row / kGroupedTile) * (padded_to_super(inputs) / kRowGroup) + k / kRowGroup;
        int8_t* const from = const_cast<int8_t*>(&bytes_[number * tile * Int8Group::kBytes]);
        return Int8Group{from, reinterpret_cast<float*>(from + tile * kRowGroup), tile}.skip_rows(row % kGroupedTile);
    }

  private:
    // A group with a NaN gets the scale NaN, and so do its results.
    static void quantize_group(const Vec16 (&halves)[2], const Int8Group& to) {
        const Vec16 lower = halves[0] < halves[1] ? halves[0] : halves[1], upper = halves[0] < halves[1] ? halves[1] : halves[0];
        const float low = -reduce_max(-lower), high = reduce_max(upper);
        const bool has_nan = any_nan(halves[0]) || any_nan(halves[1]);
        constexpr float kMost = 127.0f;
        const float scale = has_nan ? __builtin_nanf("") : (high - low) / (2 * kMost), middle = (high + low) / 2;
        const float inverse = scale > 0.0f ? 1 / scale : 0.0f;
        float sums[2];
        for (int half = 0; half < 2; half++) {
            const Vec16i rounded = (Vec16i)((halves[half] - middle) * inverse + kRoundToInt) - kRoundToIntBits;
            const Vec16b bytes = __builtin_convertvector(rounded, Vec16b);
            memcpy(to.row(0) + half * kVecSize, &bytes, sizeof bytes);
            sums[half] = scale * (float)reduce_add(rounded) + kVecSize * middle;
        }
        const float fields[Int8Group::kFields] = {scale, middle, sums[0], sums[1], sums[0] + sums[1]};
        for (int n = 0; n < Int8Group::kFields; n++) to.field((Int8Group::Field)n, 0) = fields[n];
    }

    AlignedVector<int8_t> bytes_;
};
