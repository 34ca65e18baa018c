// Keys and values in int8, and the numbers that they are multiplied with, in int16: with a limit L of 127 or 32767,
//   numbers[i] = round(x[i] / scale), scale = max |x| / L
// over a head's key, value or query, or over a query's weights of a tile of tokens. Sums of products of int16 and int8 are
// exact in int32, in any order and on any machine: 32767 * 127 * 256 < 2^31, for heads of up to 256 and tiles of 256 tokens.
//
// Layout: as `from`, contiguous; pairs of int8 as in kv_layout.hpp.
// ISA variants: __AVX512VNNI__ uses vpdpwssd; __AVX512BW__ and __AVX2__ use vpmaddwd; otherwise compiler vectors. Test:
// tests/inference/test_int8_kv.py. It knows no blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd.hpp"

template <typename Number>
constexpr float kQuantizedMax = (1 << (8 * sizeof(Number) - 1)) - 1;

// The maximum of |x|, where a NaN is more than all numbers: without the sign, floats are ordered as integers are.
class MaxMagnitude {
  public:
    void add(Vec16 numbers) {
        constexpr int32_t kMagnitude = 0x7fffffff;
        const Vec16i magnitudes = (Vec16i)numbers & kMagnitude;
        maxima_ = magnitudes > maxima_ ? magnitudes : maxima_;
    }

    float get() const {
#ifdef __AVX512F__
        const int32_t max = _mm512_reduce_max_epi32((__m512i)maxima_);
#else
        int32_t max = 0;
        for (int i = 0; i < kVecSize; i++) max = maxima_[i] > max ? maxima_[i] : max;
#endif
        float result;
        memcpy(&result, &max, sizeof result);
        return result;
    }

  private:
    Vec16i maxima_ = {};
};

// Returns the scale, where `max` is max |x|. `count` is a multiple of 16; numbers may take the place of `from`. A scale that is
// no number, or infinite, makes results so.
template <typename Number>
float quantize(const float* from, int count, float max, Number* to) {
    typedef Number Numbers __attribute__((vector_size(kVecSize * sizeof(Number))));
    // Less has no finite inverse.
    constexpr float kLeast = 1e-30f;
    const float inverse_scale = max < kLeast ? 0.0f : kQuantizedMax<Number> / max;
    for (int k = 0; k < count; k += kVecSize) {
        const Vec16i rounded = (Vec16i)(load(from + k) * inverse_scale + kRoundToInt) - kRoundToIntBits;
        const Numbers numbers = __builtin_convertvector(rounded, Numbers);
        memcpy(to + k, &numbers, sizeof numbers);
    }
    return max < kLeast ? 0.0f : max / kQuantizedMax<Number>;
}

template <typename Number>
float quantize(const float* from, int count, Number* to) {
    MaxMagnitude max;
    for (int k = 0; k < count; k += kVecSize) max.add(load(from + k));
    return quantize(from, count, max.get(), to);
}

inline Vec16 to_vec(const Reg16i& numbers) {
    return __builtin_convertvector((Vec16i)numbers, Vec16);
}

inline Reg16i load_regs(const int32_t* from) {
    Reg16i v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void store(int32_t* to, const Reg16i& v) { memcpy(to, &v, sizeof v); }

// 16 pairs of int8: add(total, by) is total[i] += by[0] * from[2 i] + by[1] * from[2 i + 1].
#ifdef __AVX512BW__
struct Int8Pairs {
    __m512i pairs;
    explicit Int8Pairs(const int8_t* from) : pairs(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from))) {}
    void add(Reg16i& total, const int16_t* by) const {
        int32_t pair;
        memcpy(&pair, by, sizeof pair);
#ifdef __AVX512VNNI__
        total = (Reg16i)_mm512_dpwssd_epi32((__m512i)total, pairs, _mm512_set1_epi32(pair));
#else
        total += (Reg16i)_mm512_madd_epi16(pairs, _mm512_set1_epi32(pair));
#endif
    }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct Int8Pairs {
    __m256i pairs[2];
    explicit Int8Pairs(const int8_t* from) {
        for (int i = 0; i < 2; i++) pairs[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from + i));
    }
    void add(Reg16i& total, const int16_t* by) const {
        int32_t pair;
        memcpy(&pair, by, sizeof pair);
        for (int i = 0; i < 2; i++) total.regs[i] += (RegInt)_mm256_madd_epi16(pairs[i], _mm256_set1_epi32(pair));
    }
};
#else
struct Int8Pairs {
    Vec16i even, odd;
    explicit Int8Pairs(const int8_t* from) {
        int16_t pairs[kVecSize];
        memcpy(pairs, from, sizeof pairs);
        for (int i = 0; i < kVecSize; i++) even[i] = (int8_t)pairs[i], odd[i] = pairs[i] >> 8;
    }
    void add(Reg16i& total, const int16_t* by) const {
        const Vec16i sum = (Vec16i)total + even * by[0] + odd * by[1];
        memcpy(&total, &sum, sizeof total);
    }
};
#endif
