// Norms of a row of `width` numbers: the formulas of Norm in program.hpp.
//
// Layout: a row is contiguous. Sums are 16 partial ones, the same for each width and batch.
// ISA variants: those of simd.hpp. Test: tests/inference/test_native.py.
#pragma once

#include <cmath>

#include "program.hpp"
#include "simd.hpp"

// Calls `output(column, 16 numbers)`.
template <typename Output>
void normalize(const Norm& norm, const float* from, int width, Output output) {
    if (norm.kind == NormKind::kNone) {
        for (int k = 0; k < width; k += kVecSize) output(k, load(from + k));
        return;
    }
    Vec16 total = {}, squares = {};
    if (norm.kind == NormKind::kLayer)
        for (int k = 0; k < width; k += kVecSize) total += load(from + k);
    const float mean = reduce_add(total) / width;
    for (int k = 0; k < width; k += kVecSize) {
        const Vec16 centered = load(from + k) - mean;
        squares += centered * centered;
    }
    const float inverse = 1.0f / std::sqrt(reduce_add(squares) / width + norm.epsilon);
    for (int k = 0; k < width; k += kVecSize) {
        Vec16 scaled = (load(from + k) - mean) * inverse;
        if (norm.weight) scaled *= load(norm.weight + k);
        output(k, norm.bias ? scaled + load(norm.bias + k) : scaled);
    }
}
