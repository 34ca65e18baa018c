// SIMD vectors of 16 numbers, v[i] = from[i], i in [0, 16), and the same in hardware registers: loads, stores, conversions.
//
// Layout: a bfloat16 is the upper half of a float32 (float bits = bf16 bits << 16).
// ISA variants: compiler vectors, which -march lowers to one AVX-512, two AVX or four SSE registers. __AVX512F__ and __AVX2__ add
// conversions to and from bytes, __AVX2__ and __AVX512BF16__ the rounding to bfloat16.
// Tests: those of simd.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "aligned_vector.hpp"

// F16C and FMA, which some processors have without AVX2, use AVX's registers.
#ifdef __AVX__
#include <immintrin.h>
#endif

typedef float Vec16 __attribute__((vector_size(64)));
typedef int32_t Vec16i __attribute__((vector_size(64)));
typedef uint32_t Vec16u __attribute__((vector_size(64)));
typedef uint16_t Vec16h __attribute__((vector_size(32)));

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

inline void store(float* to, Vec16 v) { memcpy(to, &v, sizeof v); }

// Reg16: 16 numbers in as many hardware registers as they need, for accumulators in inner loops. GCC keeps such registers
// across iterations, but spills a Vec16 that is wider than one register to memory, where each sum waits for the last store.
#ifdef __AVX512F__
typedef Vec16 Reg16;
typedef Vec16i Reg16i;

inline Vec16 load(const bf16* from) {
    Vec16h h;
    memcpy(&h, from, sizeof h);
    return (Vec16)(__builtin_convertvector(h, Vec16u) << 16);
}

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
#ifdef __AVX2__
        // GCC 12 converts halves of a register, and joins them.
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
        v.regs[i] = (Reg)((RegUint)_mm256_cvtepu16_epi32(halves) << 16);
#else
        RegHalf halves;
        memcpy(&halves, from + i * kRegSize, sizeof halves);
        v.regs[i] = (Reg)(__builtin_convertvector(halves, RegUint) << 16);
#endif
    }
    return v;
}

inline Vec16 load(const bf16* from) { return load_regs(from); }

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

inline Reg16 to_regs(const Vec16& v) {
    Reg16 regs;
    memcpy(&regs, &v, sizeof regs);
    return regs;
}

// function(v...) of all numbers, by the operators of a hardware register's vector. Operators of a Vec16 that is wider than one are
// compiled to one number after the other where they compare or convert.
#ifdef __AVX512F__
template <typename Function, typename... Groups>
inline Reg16 map_floats(Function function, const Groups&... groups) {
    return function(groups...);
}
template <typename Function, typename... Groups>
inline Reg16i map_ints(Function function, const Groups&... groups) {
    return function(groups...);
}
#else
template <typename Function, typename... Groups>
inline Reg16 map_floats(Function function, const Groups&... groups) {
    Reg16 result;
#pragma GCC unroll 4
    for (int i = 0; i < kRegsPerVec; i++) result.regs[i] = function(groups.regs[i]...);
    return result;
}
template <typename Function, typename... Groups>
inline Reg16i map_ints(Function function, const Groups&... groups) {
    Reg16i result;
#pragma GCC unroll 4
    for (int i = 0; i < kRegsPerVec; i++) result.regs[i] = function(groups.regs[i]...);
    return result;
}
#endif

// b where one of both is NaN.
inline Reg16 min(const Reg16& a, const Reg16& b) {
    return map_floats([](auto x, auto y) { return x < y ? x : y; }, a, b);
}
inline Reg16 max(const Reg16& a, const Reg16& b) {
    return map_floats([](auto x, auto y) { return x > y ? x : y; }, a, b);
}

// Signed bytes, and the lowest byte of each number.
inline Reg16i load_bytes(const void* from) {
#ifdef __AVX512F__
    return (Vec16i)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return {(RegInt)_mm256_cvtepi8_epi32(bytes), (RegInt)_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
#else
    typedef int8_t RegByte __attribute__((vector_size(kRegSize)));
    Reg16i result;
    for (int i = 0; i < kRegsPerVec; i++) {
        RegByte bytes;
        memcpy(&bytes, static_cast<const char*>(from) + i * sizeof bytes, sizeof bytes);
        result.regs[i] = __builtin_convertvector(bytes, RegInt);
    }
    return result;
#endif
}
inline void store_bytes(void* to, const Reg16i& numbers) {
#ifdef __AVX512F__
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)numbers));
#elif defined(__AVX2__)
    const __m256i mask = _mm256_set1_epi32(255);
    const __m256i first = _mm256_and_si256((__m256i)numbers.regs[0], mask), second = _mm256_and_si256((__m256i)numbers.regs[1], mask);
    // Each half of the register is packed on its own: the quarters are put into their order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm_packus_epi16(low, high));
#else
    const Vec16i all = numbers;
    for (int i = 0; i < kVecSize; i++) static_cast<uint8_t*>(to)[i] = (uint8_t)all[i];
#endif
}

inline Reg16 to_floats(const Reg16i& numbers) {
#ifdef __AVX512F__
    return __builtin_convertvector(numbers, Vec16);
#else
    return map_floats([](RegInt reg) { return __builtin_convertvector(reg, Reg); }, numbers);
#endif
}

#ifndef __AVX512BF16__
// The upper halves of floats, rounded: see store(bf16*, Vec16).
inline Vec16h rounded_halves(Vec16 v) {
    constexpr int kAlmostHalf = 0x7fff, kQuietBit = 0x40;
    const auto round = [](auto number) {
        typedef uint32_t Bits __attribute__((vector_size(sizeof number)));
        const Bits bits = (Bits)number, rounded = (bits + kAlmostHalf + ((bits >> 16) & 1)) >> 16;
        return (decltype(number == number))(number == number ? rounded : (bits >> 16) | kQuietBit);
    };
    const Reg16i halves = map_ints(round, to_regs(v));
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Each half of the register is packed on its own: the quarters are put into their order.
    const __m256i packed = _mm256_packus_epi32((__m256i)halves.regs[0], (__m256i)halves.regs[1]);
    return (Vec16h)_mm256_permute4x64_epi64(packed, 0xd8);
#else
    return __builtin_convertvector((Vec16i)halves, Vec16h);
#endif
}
#endif

// Rounds to nearest, ties to even. A NaN stays a NaN: its quiet bit is set, since the upper half of its fraction may be 0.
// The instruction makes 0 of what is too small for a normal float, as those that multiply bfloat16 do.
inline void store(bf16* to, Vec16 v) {
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    const Vec16h h = rounded_halves(v);
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
