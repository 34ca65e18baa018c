// Quantized rows of one matmul: xq = round(x / scale), scale = max |x| / 127 over each group of 256 inputs.
//
// Layout: xq[r][k] at r * padded + k; inputs are padded by zeros to a multiple of 64.
// ISA variants: those of simd.hpp. Test: tests/inference/test_int8.py. It knows no weights.
#pragma once

#include <algorithm>
#include <cstddef>

#include "rows.hpp"
#include "simd.hpp"

// Inputs are padded to the row of a tile, 64 bytes. A scale covers 256 inputs: four such rows.
constexpr int kInt8Padding = 64, kGroupInputs = 256;
// Quantized numbers are -127 to 127.
constexpr float kInt8Max = 127.0f;

inline int padded_inputs(int inputs) { return (inputs + kInt8Padding - 1) / kInt8Padding * kInt8Padding; }
inline int group_count(int inputs) { return (inputs + kGroupInputs - 1) / kGroupInputs; }

// The quantized rows of one matmul.
class Int8Rows {
  public:
    void reserve(size_t rows, int inputs) {
        numbers_.resize(std::max(numbers_.size(), rows * padded_inputs(inputs)));
        scales_.resize(std::max(scales_.size(), rows * group_count(inputs)));
        sums_.resize(scales_.size());
    }

    template <typename T>
    void quantize(const Rows<T>& from, int row) {
        const int inputs = from.inputs(), groups = group_count(inputs);
        int8_t* to = &numbers_[(size_t)row * padded_inputs(inputs)];
        for (int group = 0; group < groups; group++) {
            const int first = group * kGroupInputs, count = std::min(kGroupInputs, inputs - first);
            quantize_group([&](int k) { return load_regs(from.at(row, first + k)); }, count, to + first, (size_t)row * groups + group);
        }
        std::fill(to + inputs, to + padded_inputs(inputs), 0);
    }

    const int8_t* row(int row, int inputs) const { return &numbers_[(size_t)row * padded_inputs(inputs)]; }
    float scale(int row, int inputs, int group) const { return scales_[(size_t)row * group_count(inputs) + group]; }
    int32_t sum(int row, int inputs, int group) const { return sums_[(size_t)row * group_count(inputs) + group]; }

  private:
    // A group with a NaN gets the scale NaN, and so do its results. `numbers(k)`: 16 of them from the group's input k on.
    template <typename Numbers>
    void quantize_group(Numbers numbers, int count, int8_t* to, size_t group) {
        Reg16 maxima = {};
        Reg16i total = {};
        bool has_nan = false;
        for (int k = 0; k < count; k += kVecSize) {
            const Reg16 values = numbers(k);
            maxima = map_floats([](auto x, auto most) { return x > most ? x : -x > most ? -x : most; }, values, maxima);
            has_nan |= any_nan(values);
        }
        const float max = reduce_max(maxima), inverse_scale = max > 0.0f ? kInt8Max / max : 0.0f;
        for (int k = 0; k < count; k += kVecSize) {
            const Reg16i rounded = round_to_ints(map_floats([&](auto x) { return x * inverse_scale; }, numbers(k)));
            store_bytes(to + k, rounded);
            total += rounded;
        }
        scales_[group] = has_nan ? __builtin_nanf("") : max / kInt8Max;
        sums_[group] = reduce_add(total);
    }

    AlignedVector<int8_t> numbers_;
    AlignedVector<float> scales_;
    // The sum of a group's numbers, for kWeightOffset.
    AlignedVector<int32_t> sums_;
};
