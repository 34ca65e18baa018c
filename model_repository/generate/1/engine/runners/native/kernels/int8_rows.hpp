// Quantized rows of one matmul: xq = round(x / scale), scale = max |x| / 127 over each group of 256 inputs.
//
// Layout: tiles as rows.hpp's, with lines of 64 inputs: xq[r][k] at [r / tile][k / 64][r % tile][k % 64]; for AMX, which reads
// contiguous rows faster, at r * padded + k. Inputs are padded by zeros to a multiple of 64.
// ISA variants: those of simd.hpp; the layout is that of int8.hpp's. Test: tests/inference/test_int8.py. It knows no weights.
#pragma once

#include <algorithm>
#include <cstddef>

#include "rows.hpp"
#include "simd.hpp"

// Inputs are padded to the row of a tile, 64 bytes. A scale covers 256 inputs: four such rows.
constexpr int kInt8Padding = 64, kGroupInputs = 256;

// Rows of a tile, whose lines are 64 bytes apart. AMX reads contiguous rows faster.
#ifdef __AMX_INT8__
constexpr int kInt8Tile = 1;
#else
constexpr int kInt8Tile = kPassRows;
#endif
// Quantized numbers are -127 to 127.
constexpr float kInt8Max = 127.0f;

inline int padded_inputs(int inputs) { return (inputs + kInt8Padding - 1) / kInt8Padding * kInt8Padding; }
inline int group_count(int inputs) { return (inputs + kGroupInputs - 1) / kGroupInputs; }

// The quantized rows of one matmul.
class Int8Rows {
  public:
    void reserve(size_t rows, int inputs) {
        rows = (rows + kInt8Tile - 1) / kInt8Tile * kInt8Tile;
        numbers_.resize(std::max(numbers_.size(), rows * padded_inputs(inputs)));
        scales_.resize(std::max(scales_.size(), rows * group_count(inputs)));
        sums_.resize(scales_.size());
    }

    template <typename T>
    void quantize(const T* from, int row, int inputs) {
        const int groups = group_count(inputs);
        for (int group = 0; group < groups; group++) {
            const int first = group * kGroupInputs, count = std::min(kGroupInputs, inputs - first);
            quantize_group(from, first, count, row, inputs);
        }
        for (int k = inputs; k < padded_inputs(inputs); k += kVecSize) memset(&numbers_[index_of(row, k, inputs)], 0, kVecSize);
    }

    // 64 numbers are contiguous from a multiple of 64 on.
    const int8_t* at(int row, int k, int inputs) const { return &numbers_[index_of(row, k, inputs)]; }
    float scale(int row, int inputs, int group) const { return scales_[(size_t)row * group_count(inputs) + group]; }
    int32_t sum(int row, int inputs, int group) const { return sums_[(size_t)row * group_count(inputs) + group]; }

  private:
    static size_t index_of(int row, int k, int inputs) {
        const size_t tile = (size_t)(row / kInt8Tile * kInt8Tile) * padded_inputs(inputs);
        return tile + (k / kInt8Padding * kInt8Tile + row % kInt8Tile) * kInt8Padding + k % kInt8Padding;
    }

    // A group with a NaN gets the scale NaN, and so do its results.
    template <typename T>
    void quantize_group(const T* from, int first, int count, int row, int inputs) {
        Vec16 maxima = {};
        Vec16i nan_mask = {}, total = {};
        for (int k = first; k < first + count; k += kVecSize) {
            const Vec16 values = load(from + k), magnitudes = values < 0.0f ? -values : values;
            maxima = magnitudes > maxima ? magnitudes : maxima;
            nan_mask |= values != values;
        }
        const float max = reduce_max(maxima), inverse_scale = max > 0.0f ? kInt8Max / max : 0.0f;
        for (int k = first; k < first + count; k += kVecSize) {
            const Vec16i rounded = (Vec16i)(load(from + k) * inverse_scale + kRoundToInt) - kRoundToIntBits;
            const Vec16b bytes = __builtin_convertvector(rounded, Vec16b);
            memcpy(&numbers_[index_of(row, k, inputs)], &bytes, sizeof bytes);
            total += rounded;
        }
        int32_t sum = 0, has_nan = 0;
        for (int i = 0; i < kVecSize; i++) sum += total[i], has_nan |= nan_mask[i];
        const size_t group = (size_t)row * group_count(inputs) + first / kGroupInputs;
        scales_[group] = has_nan ? __builtin_nanf("") : max / kInt8Max;
        sums_[group] = sum;
    }

    AlignedVector<int8_t> numbers_;
    AlignedVector<float> scales_;
    // The sum of a group's numbers, for kWeightOffset.
    AlignedVector<int32_t> sums_;
};
