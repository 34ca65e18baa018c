// Activation rows in int8 for weights in groups. Over each group of 32 inputs
//   x = scale * xq + middle,  scale = (max x - min x) / 254,  middle = (max x + min x) / 2
// One-sided groups, which are usual, have half of the error that a scale of max |x| / 127 gives.
//
// Layout: tiles of rows that are multiplied together, [row / tile][group][row % tile], each 52 bytes:
//   32 numbers in int8; then in float32 scale, middle, and sums of the quantized x: of the first 16, of the other 16, of all 32
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
    static constexpr int kRowBytes = kRowGroup + kFields * sizeof(float);
    const uint8_t* from;

    const int8_t* row(int i) const { return reinterpret_cast<const int8_t*>(from + i * kRowBytes); }
    float field(Field field, int i) const {
        float x;
        memcpy(&x, from + i * kRowBytes + kRowGroup + field * sizeof x, sizeof x);
        return x;
    }
};

class GroupedRows {
  public:
    void reserve(size_t rows, int inputs) {
        const size_t tiles = (rows + kGroupedTile - 1) / kGroupedTile;
        bytes_.resize(std::max(bytes_.size(), tiles * (padded_to_super(inputs) / kRowGroup) * tile_bytes(kGroupedTile)));
    }

    // The rows of a tile, for this many rows.
    static int tile_for(int rows) { return pass_rows(rows, kGroupedTile); }

    template <typename T>
    void quantize(const Rows<T>& from, int row, int tile) {
        const int inputs = from.inputs(), groups = padded_to_super(inputs) / kRowGroup;
        for (int group = 0; group < groups; group++) {
            Vec16 halves[2] = {};
            for (int half = 0; half < 2; half++)
                if (const int k = group * kRowGroup + half * kVecSize; k < inputs) halves[half] = load(from.at(row, k));
            quantize_group(halves, &bytes_[offset(row, groups, group, tile)]);
        }
    }

    // Of the group of inputs from k on.
    Int8Group group(int row, int inputs, int k, int tile) const {
        return {&bytes_[offset(row, padded_to_super(inputs) / kRowGroup, k / kRowGroup, tile)]};
    }

    // From one group of rows to the next.
    static size_t tile_bytes(int tile) { return (size_t)tile * Int8Group::kRowBytes; }

  private:
    static size_t offset(int row, int groups, int group, int tile) {
        return ((size_t)(row / kGroupedTile) * groups + group) * tile_bytes(tile) + row % kGroupedTile * Int8Group::kRowBytes;
    }

    // A group with a NaN gets the scale NaN, and so do its results.
    static void quantize_group(const Vec16 (&halves)[2], uint8_t* to) {
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
            memcpy(to + half * kVecSize, &bytes, sizeof bytes);
            sums[half] = scale * (float)reduce_add(rounded) + kVecSize * middle;
        }
        const float fields[Int8Group::kFields] = {scale, middle, sums[0], sums[1], sums[0] + sums[1]};
        memcpy(to + kRowGroup, fields, sizeof fields);
    }

    AlignedVector<uint8_t> bytes_;
};
