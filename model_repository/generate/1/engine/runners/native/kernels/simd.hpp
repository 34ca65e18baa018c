// SIMD vectors of 16 numbers: v[i] = from[i], i in [0, 16). Loads, stores, reductions, argmax, exp, SiLU and GELU.
//
// Layout: a bfloat16 is the upper half of a float32 (float bits = bf16 bits << 16).
// ISA variants: compiler vectors, which -march lowers to one AVX-512, two AVX or four SSE registers. __AVX512F__ adds
// reductions and _mm512_rcp14_ps. Each variant is a library; isa_variants.py chooses one at load time.
// Tests: tests/inference/test_native.py (each variant against transformers), test_native_sampling.py. It knows no models.
#pragma once

#include <cstdint>
#include <cstring>

#include "aligned_vector.hpp"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float Vec16 __attribute__((vector_size(64)));
typedef int32_t Vec16i __attribute__((vector_size(64)));
typedef uint32_t Vec16u __attribute__((vector_size(64)));
typedef uint16_t Vec16h __attribute__((vector_size(32)));
typedef int8_t Vec16b __attribute__((vector_size(16)));

// Numbers in a vector: a cache line of float32.
constexpr int kVecSize = 16;

struct bf16 {
    uint16_t bits;
};

inline Vec16 splat(float x) { return Vec16{} + x; }

inline Vec16 load(const float* from) {
    Vec16 v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Vec16 load(const bf16* from) {
    Vec16h h;
    memcpy(&h, from, sizeof h);
    return (Vec16)(__builtin_convertvector(h, Vec16u) << 16);
}

inline void store(float* to, Vec16 v) { memcpy(to, &v, sizeof v); }

// Rounds to nearest, ties to even. A NaN stays a NaN: its quiet bit is set, since the upper half of its fraction may be 0.
// The instruction makes 0 of what is too small for a normal float, as those that multiply bfloat16 do.
inline void store(bf16* to, Vec16 v) {
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    constexpr int kAlmostHalf = 0x7fff, kQuietBit = 0x40;
    Vec16u bits = (Vec16u)v;
    Vec16u rounded = (bits + kAlmostHalf + ((bits >> 16) & 1)) >> 16;
    Vec16h h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | kQuietBit, Vec16h);
#endif
    memcpy(to, &h, sizeof h);
}

inline void round_to(float& to, float x) { to = x; }

inline void round_to(bf16& to, float x) {
    constexpr uint32_t kAlmostHalf = 0x7fff, kQuietBit = 0x40;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    to.bits = x == x ? (bits + kAlmostHalf + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | kQuietBit;
}

// Reg16: 16 numbers in as many hardware registers as they need, for accumulators in inner loops. GCC keeps such registers
// across iterations, but spills a Vec16 that is wider than one register to memory, where each sum waits for the last store.
#ifdef __AVX512F__
typedef Vec16 Reg16;
typedef Vec16i Reg16i;

template <typename T>
Reg16 load_regs(const T* from) {
    return load(from);
}

// 16 pairs of bfloat16: first[i] = from[2 i], second[i] = from[2 i + 1].
inline void split_pairs(const bf16* from, Reg16& first, Reg16& second) {
    Vec16u pairs;
    memcpy(&pairs, from, sizeof pairs);
    first = (Vec16)(pairs << 16);
    second = (Vec16)(pairs & 0xffff0000u);
}
#else
// Floats in one hardware register.
#ifdef __AVX__
constexpr int kRegSize = 8;
#else
constexpr int kRegSize = 4;
#endif
constexpr int kRegsPerVec = kVecSize / kRegSize;
typedef float Reg __attribute__((vector_size(4 * kRegSize)));
typedef int32_t RegInt __attribute__((vector_size(4 * kRegSize)));
typedef uint32_t RegUint __attribute__((vector_size(4 * kRegSize)));
typedef uint16_t RegHalf __attribute__((vector_size(2 * kRegSize)));

template <typename Register, typename Vector>
struct RegGroup {
    Register regs[kRegsPerVec];

    RegGroup& operator+=(const RegGroup& other) {
        for (int i = 0; i < kRegsPerVec; i++) regs[i] += other.regs[i];
        return *this;
    }
    operator Vector() const {
        Vector v;
        memcpy(&v, regs, sizeof v);
        return v;
    }
};
typedef RegGroup<Reg, Vec16> Reg16;
typedef RegGroup<RegInt, Vec16i> Reg16i;

inline Reg16 operator*(float x, Reg16 v) {
    for (Reg& reg : v.regs) reg *= x;
    return v;
}

inline Reg16 operator*(Reg16 v, const Reg16& other) {
    for (int i = 0; i < kRegsPerVec; i++) v.regs[i] *= other.regs[i];
    return v;
}

inline Reg16 operator+(Reg16 v, const Reg16& other) { return v += other; }

inline Reg16 load_regs(const float* from) {
    Reg16 v;
    for (int i = 0; i < kRegsPerVec; i++) memcpy(&v.regs[i], from + i * kRegSize, sizeof(Reg));
    return v;
}

inline Reg16 load_regs(const bf16* from) {
    Reg16 v;
    for (int i = 0; i < kRegsPerVec; i++) {
        RegHalf halves;
        memcpy(&halves, from + i * kRegSize, sizeof halves);
        v.regs[i] = (Reg)(__builtin_convertvector(halves, RegUint) << 16);
    }
    return v;
}

inline void split_pairs(const bf16* from, Reg16& first, Reg16& second) {
    for (int i = 0; i < kRegsPerVec; i++) {
        RegUint pairs;
        memcpy(&pairs, from + 2 * i * kRegSize, sizeof pairs);
        first.regs[i] = (Reg)(pairs << 16);
        second.regs[i] = (Reg)(pairs & 0xffff0000u);
    }
}

inline void store(float* to, const Reg16& v) {
    for (int i = 0; i < kRegsPerVec; i++) memcpy(to + i * kRegSize, &v.regs[i], sizeof(Reg));
}
#endif

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

inline float reduce_add(Vec16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = kVecSize / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

inline int32_t reduce_add(Vec16i v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    for (int half = kVecSize / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

// For numbers that are not NaN.
inline float reduce_max(Vec16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float result = v[0];
    for (int i = 1; i < kVecSize; i++) result = v[i] > result ? v[i] : result;
    return result;
#endif
}

inline bool any_nan(Vec16 v) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
#else
    const Vec16i nan_mask = v != v;
    int32_t any = 0;
    for (int i = 0; i < kVecSize; i++) any |= nan_mask[i];
    return any;
#endif
}

// The maximum and the first index that holds it; {NaN, 0} if any number is a NaN.
struct ArgMax {
    float value;
    int64_t index;
};

inline ArgMax argmax(const float* from, int count) {
    const int whole = count / kVecSize * kVecSize;
    Vec16 maxima = splat(-__builtin_inff());
    Vec16i indices = {}, nan_mask = {};
    for (int i = 0; i < whole; i += kVecSize) {
        const Vec16 values = load(from + i);
        indices = values > maxima ? Vec16i{} + i : indices;
        maxima = values > maxima ? values : maxima;
        nan_mask |= values != values;
    }
    ArgMax best = {-__builtin_inff(), 0};
    bool has_nan = false;
    for (int i = 0; i < kVecSize; i++) {
        has_nan |= nan_mask[i] != 0;
        const int64_t index = indices[i] + i;
        if (maxima[i] > best.value || (maxima[i] == best.value && index < best.index)) best = {maxima[i], index};
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

// exp(x) = 2^n * p(x - n ln 2), n = round(x / ln 2), p the polynomial of Cephes' expf: error of about one unit in the last
// place. x is clamped to [-87, 88], where 2^n is a normal float; exp(-87) adds nothing to a sum that has a term of 1.
inline Vec16 exp(Vec16 x) {
    constexpr float kLowest = -87.0f, kHighest = 88.0f, kLog2E = 1.44269504f;
    // ln 2 = kLn2High - kLn2Low, and n * kLn2High is exact.
    constexpr float kLn2High = 0.693359375f, kLn2Low = 2.12194440e-4f;
    constexpr int kExponentBias = 127, kFractionBits = 23;
    x = x < splat(kLowest) ? splat(kLowest) : x;
    x = x > splat(kHighest) ? splat(kHighest) : x;
    Vec16 shifted = x * kLog2E + kRoundToInt;
    Vec16 n = shifted - kRoundToInt;
    Vec16 r = x - n * kLn2High + n * kLn2Low;
    Vec16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Vec16u power = ((Vec16u)shifted - kRoundToIntBits + kExponentBias) << kFractionBits;
    return p * (Vec16)power;
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
