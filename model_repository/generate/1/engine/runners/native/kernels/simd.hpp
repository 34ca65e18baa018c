// Of SIMD vectors of 16 numbers (vectors.hpp): reductions, argmax, rounding, exp, SiLU and GELU.
//
// ISA variants: compiler vectors; __AVX512F__ adds reductions and _mm512_rcp14_ps. Each variant is a library; isa_variants.py
// chooses one at load time.
// Tests: tests/inference/test_native.py (each variant against transformers), test_native_sampling.py. It knows no models.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.hpp"

// Reg16 accumulators that fit the register file beside their operands: of 32 registers of 16 floats, or 16 of 8 floats.
#ifdef __AVX512F__
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 4;
#endif

inline float to_float(float x) { return x; }

inline float to_float(int8_t x) { return x; }

inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// The first half of a vector and its second half, combined, until one number is left.
template <typename Vector, typename Function>
inline auto reduce(const Vector& v, Function function) {
    typedef std::remove_cv_t<std::remove_reference_t<decltype(v[0])>> Number;
    constexpr int kHalf = sizeof(Vector) / sizeof(Number) / 2;
    if constexpr (kHalf == 1) return function(v[0], v[1]);
    else {
        typedef Number Half __attribute__((vector_size(kHalf * sizeof(Number))));
        Half halves[2];
        memcpy(halves, &v, sizeof halves);
        return reduce((Half)function(halves[0], halves[1]), function);
    }
}

inline float reduce_add(Vec16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return reduce(v, [](auto a, auto b) { return a + b; });
#endif
}

inline int32_t reduce_add(Vec16i v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    return reduce(v, [](auto a, auto b) { return a + b; });
#endif
}

// For numbers that are not NaN.
inline float reduce_max(Vec16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    return reduce(v, [](auto a, auto b) { return b > a ? b : a; });
#endif
}

inline bool any_nan(const Reg16& v) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
#else
    return reduce((Vec16i)map_ints([](Reg reg) { return reg != reg; }, v), [](auto a, auto b) { return a | b; });
#endif
}

// The maximum and the first index that holds it; {NaN, 0} if any number is a NaN.
struct ArgMax {
    float value;
    int64_t index;
};

inline ArgMax argmax(const float* from, int count) {
    const int whole = count / kVecSize * kVecSize;
    Reg16 maxima = to_regs(splat(-__builtin_inff()));
    Reg16i indices = {}, nan_mask = {};
    for (int i = 0; i < whole; i += kVecSize) {
        const Reg16 values = load_regs(from + i);
        const auto later = [&](auto value, auto most, auto index) { return value > most ? decltype(index){} + i : index; };
        indices = map_ints(later, values, maxima, indices);
        maxima = max(values, maxima);
        nan_mask = map_ints([](auto value, auto mask) { return mask | (value != value); }, values, nan_mask);
    }
    const Vec16 most = maxima;
    const Vec16i first = indices, nans = nan_mask;
    ArgMax best = {-__builtin_inff(), 0};
    bool has_nan = false;
    for (int i = 0; i < kVecSize; i++) {
        has_nan |= nans[i] != 0;
        const int64_t index = first[i] + i;
        if (most[i] > best.value || (most[i] == best.value && index < best.index)) best = {most[i], index};
    }
    for (int i = whole; i < count; i++) {
        has_nan |= from[i] != from[i];
        if (from[i] > best.value) best = {from[i], i};
    }
    return has_nan ? ArgMax{__builtin_nanf(""), 0} : best;
}

// 1.5 * 2^23, and its bits. For |x| < 2^22, x + kRoundToInt rounds x to the nearest integer n, and its bits are
// kRoundToIntBits + n.
constexpr float kRoundToInt = 12582912.0f;
constexpr int32_t kRoundToIntBits = 0x4b400000;

// The nearest integers, and an offset.
inline Reg16i round_to_ints(const Reg16& numbers, int offset = 0) {
#ifdef __AVX512F__
    return (Vec16i)(numbers + kRoundToInt) - kRoundToIntBits + offset;
#else
    return map_ints([&](Reg reg) { return (RegInt)(reg + kRoundToInt) - kRoundToIntBits + offset; }, numbers);
#endif
}

// exp(x) = 2^n * p(x - n ln 2), n = round(x / ln 2), p the polynomial of Cephes' expf: error of about one unit in the last
// place. x is clamped to [-87, 88], where 2^n is a normal float; exp(-87) adds nothing to a sum that has a term of 1.
template <typename Vector>
inline Vector exp_of(Vector x) {
    typedef uint32_t Bits __attribute__((vector_size(sizeof(Vector))));
    constexpr float kLowest = -87.0f, kHighest = 88.0f, kLog2E = 1.44269504f;
    // ln 2 = kLn2High - kLn2Low, and n * kLn2High is exact.
    constexpr float kLn2High = 0.693359375f, kLn2Low = 2.12194440e-4f;
    constexpr int kExponentBias = 127, kFractionBits = 23;
    x = x < kLowest ? Vector{} + kLowest : x;
    x = x > kHighest ? Vector{} + kHighest : x;
    Vector shifted = x * kLog2E + kRoundToInt;
    Vector n = shifted - kRoundToInt;
    Vector r = x - n * kLn2High + n * kLn2Low;
    Vector p = Vector{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Bits power = ((Bits)shifted - kRoundToIntBits + kExponentBias) << kFractionBits;
    return p * (Vector)power;
}

inline Vec16 exp(Vec16 x) {
    return map_floats([](auto reg) { return exp_of(reg); }, to_regs(x));
}

// A register of floats: what is carried from one iteration to the next stays in registers (see Reg16).
#ifdef __AVX512F__
typedef Vec16 Floats;
#else
typedef Reg Floats;
#endif
constexpr int kFloats = sizeof(Floats) / sizeof(float);

// p(r) = 2^r for |r| <= 1/2, relative error 1e-7: a polynomial fitted with p(0) = 1.
inline Floats exp2_fraction(Floats r) {
    Floats p = Floats{} + 1.326472033e-3f;
    p = p * r + 9.671513923e-3f;
    p = p * r + 5.550733954e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    return p * r + 1.0f;
}

// 1 / x. With AVX-512: a 14-bit estimate and one Newton step, error of one to two units in the last place, several times
// as fast as a division.
inline Vec16 reciprocal(Vec16 x) {
#ifdef __AVX512F__
    const Vec16 estimate = (Vec16)_mm512_rcp14_ps((__m512)x);
    return estimate * (2.0f - x * estimate);
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + exp(-x)). With AVX-512: 2^n * p(y - n), y = -x * log2(e), p = exp2_fraction, without exp's clamps.
inline Vec16 sigmoid(Vec16 x) {
#ifdef __AVX512F__
    // 2^127 is finite, and its reciprocal is 0. Less than 2^-126 adds nothing to 1.
    constexpr float kMinusLog2E = -1.44269504f, kHighest = 126.0f;
    const __m512 power = _mm512_min_ps((__m512)(x * kMinusLog2E), _mm512_set1_ps(kHighest));
    const __m512 n = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT);
    return reciprocal(1.0f + (Vec16)_mm512_scalef_ps((__m512)exp2_fraction((Vec16)(power - n)), n));
#else
    return reciprocal(1.0f + exp(-x));
#endif
}

// silu(x) = x / (1 + exp(-x))
inline Vec16 silu(Vec16 x) { return x * sigmoid(x); }

// gelu(x) = x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
inline Vec16 gelu(Vec16 x) {
    constexpr float kTwoSqrtTwoOverPi = 1.5957691216f, kCubic = 0.044715f;
    return x * sigmoid(x * (kTwoSqrtTwoOverPi + kTwoSqrtTwoOverPi * kCubic * (x * x)));
}
