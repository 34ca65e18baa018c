// The activations of an MLP, for 16 numbers: y[i] = f(x[i]), or gated f(gate[i]) * up[i].
//   silu(x) = x / (1 + exp(-x));  relu(x) = max(x, 0)
//   gelu(x) = x / 2 * (1 + erf(x / sqrt 2)), exact, or with tanh(sqrt(2 / pi) * (x + 0.044715 x^3)) in place of erf
//   clamped silu (gpt-oss): (min(max(up, -7), 7) + 1) * g / (1 + exp(-1.702 g)), g = min(gate, 7)
// ISA variants: those of simd.hpp. Test: tests/inference/test_native_families.py, each against transformers.
#pragma once

#include "program.hpp"
#include "simd.hpp"

// A NaN stays one: it is the second of two numbers.
inline Vec16 min(Vec16 x, float most) { return min(to_regs(splat(most)), to_regs(x)); }
inline Vec16 max(Vec16 x, float least) { return max(to_regs(splat(least)), to_regs(x)); }

// tanh(x) = 1 - 2 / (1 + exp(2 x))
inline Vec16 tanh(Vec16 x) { return 1.0f - 2.0f * reciprocal(1.0f + exp(2.0f * x)); }

// Abramowitz and Stegun 7.1.26: erf(x) = 1 - (a1 t + … + a5 t^5) exp(-x^2), t = 1 / (1 + p x), for x >= 0; absolute error 1.5e-7.
inline Vec16 gelu_erf(Vec16 x) {
    constexpr float kInverseSqrtTwo = 0.70710678f, kP = 0.3275911f;
    const Vec16 scaled = x * kInverseSqrtTwo, magnitude = max(to_regs(scaled), to_regs(-scaled));
    const Vec16 t = reciprocal(1.0f + kP * magnitude);
    Vec16 polynomial = splat(1.061405429f);
    polynomial = polynomial * t - 1.453152027f;
    polynomial = polynomial * t + 1.421413741f;
    polynomial = polynomial * t - 0.284496736f;
    polynomial = polynomial * t + 0.254829592f;
    const Vec16 tail = polynomial * t * exp(-magnitude * magnitude);
    // 1 + erf(x): of a negative x that is the tail itself, without cancellation.
    const auto from_tail = [](auto number, auto rest) { return number < 0.0f ? rest : 2.0f - rest; };
    return 0.5f * x * (Vec16)map_floats(from_tail, to_regs(x), to_regs(tail));
}

inline Vec16 activate(Activation activation, Vec16 x) {
    switch (activation) {
        case Activation::kSilu: return silu(x);
        case Activation::kGeluTanh: return gelu(x);
        case Activation::kGeluErf: return gelu_erf(x);
        case Activation::kRelu: return max(x, 0.0f);
        case Activation::kReluSquared: return max(x, 0.0f) * max(x, 0.0f);
        default: return x;
    }
}

inline Vec16 activate_gated(Activation activation, Vec16 gate, Vec16 up) {
    if (activation != Activation::kClampedSilu) return activate(activation, gate) * up;
    constexpr float kLimit = 7.0f, kSlope = 1.702f;
    const Vec16 clamped = min(gate, kLimit);
    return (max(min(up, kLimit), -kLimit) + 1.0f) * clamped * reciprocal(1.0f + exp(-kSlope * clamped));
}
