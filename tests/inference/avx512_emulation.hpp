// AVX-512 instructions, and those of AVX-VNNI, in C++ with AVX2, so that the code for them is tested on processors without
// them: included before the kernels (-include), this header defines the macros of the instruction sets that the flags name and
// replaces the intrinsics that the kernels use. Results are the processor's bits, with two exceptions:
//   rcp14            any reciprocal with an error of at most 2^-14 is right; this one is rounded to so few bits
//   dpbf16, rounding to bfloat16: a number that rounds to 2^-126 from below is kept, where a processor may make 0 of it
// What is less obvious, for each 32 bits of the result:
//   dpbf16_ps        total + a[1] * b[1], and to that a[0] * b[0], as fused multiply-adds in float32; denormal operands and
//                    results are 0
//   cvtneps_pbh      to nearest, ties to even; denormals are 0, NaNs become quiet
//   dpbusd, dpwssd   the exact sum of products, modulo 2^32; maddubs saturates pairs of products
//   scalef           a * 2^floor(b), rounded once
//
// Layout: 64 bytes are two halves, AVX2's registers; most instructions are AVX2's for both.
// Flags: TRITONLM_EMULATES_AVX512 (F, BW, CD, DQ, VL), with TRITONLM_EMULATES_BF16 AVX512-BF16 and AVX512-VNNI too;
// TRITONLM_EMULATES_AVX_VNNI. ISA variants: AVX2, FMA and F16C. Used by: isa_variants.py. It knows no kernels.
#pragma once

#ifdef __AVX512F__
#error "This compiler has AVX-512: its instructions need no emulation."
#endif

#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace avx512_emulation {

inline int half(int number, int) { return number; }
inline __m256i half(const __m512i& v, int i) { return reinterpret_cast<const __m256i*>(&v)[i]; }
inline __m256 half(const __m512& v, int i) { return reinterpret_cast<const __m256*>(&v)[i]; }

inline __m512i join(__m256i low, __m256i high) {
    const __m256i halves[] = {low, high};
    return reinterpret_cast<const __m512i&>(halves);
}
inline __m512 join(__m256 low, __m256 high) {
    const __m256 halves[] = {low, high};
    return reinterpret_cast<const __m512&>(halves);
}

template <typename Function, typename... Vectors>
auto by_halves(Function function, const Vectors&... v) {
    return join(function(half(v, 0)...), function(half(v, 1)...));
}

// AVX2's instruction of the same name, for both halves.
#define TRITONLM_BY_HALVES(name)                                                   \
    template <typename... Vectors>                                                 \
    auto name(const Vectors&... v) {                                               \
        return by_halves([](auto... of_half) { return _mm256_##name(of_half...); }, v...); \
    }
TRITONLM_BY_HALVES(abs_epi8)
TRITONLM_BY_HALVES(sub_epi8)
TRITONLM_BY_HALVES(shuffle_epi8)
TRITONLM_BY_HALVES(unpacklo_epi8)
TRITONLM_BY_HALVES(unpackhi_epi8)
TRITONLM_BY_HALVES(slli_epi16)
TRITONLM_BY_HALVES(srli_epi16)
TRITONLM_BY_HALVES(madd_epi16)
TRITONLM_BY_HALVES(maddubs_epi16)
TRITONLM_BY_HALVES(cvtepi32_ps)
TRITONLM_BY_HALVES(fmadd_ps)
TRITONLM_BY_HALVES(min_ps)

// Numbers as an array, for what is done one after the other.
template <typename Number>
struct Numbers {
    Number at[64 / sizeof(Number)];
    template <typename Vector>
    explicit Numbers(const Vector& v) {
        memcpy(at, &v, sizeof at);
    }
};

inline __m512i setzero_si512() { return __m512i{}; }
inline __m512i set1_epi8(char x) { return join(_mm256_set1_epi8(x), _mm256_set1_epi8(x)); }
inline __m512i set1_epi16(short x) { return join(_mm256_set1_epi16(x), _mm256_set1_epi16(x)); }
inline __m512i set1_epi32(int x) { return join(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
inline __m512 set1_ps(float x) { return join(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline __m512i broadcast_i32x4(__m128i x) { return join(_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)); }

inline __m512i loadu_si512(const void* from) {
    __m512i v;
    memcpy(&v, from, sizeof v);
    return v;
}
inline void storeu_si512(void* to, __m512i v) { memcpy(to, &v, sizeof v); }
// Memory whose bit is 0 is not read: it may not be there, or not be written yet.
inline __m512i mask_loadu_epi16(__m512i otherwise, __mmask32 mask, const void* from) {
    __m512i v = otherwise;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) memcpy(reinterpret_cast<char*>(&v) + 2 * i, static_cast<const char*>(from) + 2 * i, 2);
    return v;
}
// Memory whose bit is 0 is not written: another thread may.
inline void mask_storeu_epi16(void* to, __mmask32 mask, __m512i v) {
    const Numbers<int16_t> numbers(v);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) memcpy(static_cast<char*>(to) + 2 * i, &numbers.at[i], 2);
}

// Integers: bits, bytes, 16 bits.
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
// Bit 4 a + 2 b + c of the table is the result.
template <int kTable>
__m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c) {
    __m512i result = {};
    for (int i = 0; i < 8; i++)
        if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

inline __mmask64 movepi8_mask(__m512i v) {
    return (uint32_t)_mm256_movemask_epi8(half(v, 0)) | (uint64_t)(uint32_t)_mm256_movemask_epi8(half(v, 1)) << 32;
}
// yes[i] where bit i of the mask is 1, else no[i].
inline __m512i select_epi8(__mmask64 mask, __m512i yes, __m512i no) {
    // Byte n of a half gets byte n / 8 of the mask, of which it tests bit n % 8.
    const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m512i masks = join(_mm256_set1_epi32((int)mask), _mm256_set1_epi32((int)(mask >> 32)));
    const auto choose = [&](auto bits, auto x, auto y) {
        const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(bits, places), bit);
        return _mm256_blendv_epi8(y, x, _mm256_cmpeq_epi8(set, bit));
    };
    return by_halves(choose, masks, yes, no);
}
inline __m512i mask_sub_epi8(__m512i from, __mmask64 mask, __m512i a, __m512i b) {
    return select_epi8(mask, sub_epi8(a, b), from);
}

// Conversions.
inline __m512i cvtepi8_epi16(__m256i v) {
    return join(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1)));
}
inline __m512i cvtepi8_epi32(__m128i v) {
    return join(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
inline __m512i cvtepu16_epi32(__m256i v) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
inline __m128i cvtepi32_epi8(__m512i v) {
    const Numbers<int32_t> numbers(v);
    int8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = (int8_t)numbers.at[i];
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}
inline __m512 cvtph_ps(__m256i v) {
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}

// Floats.
template <int kPredicate>
__mmask16 cmp_ps_mask(__m512 a, __m512 b) {
    const auto of_half = [&](int i) { return _mm256_movemask_ps(_mm256_cmp_ps(half(a, i), half(b, i), kPredicate)); };
    return (__mmask16)(of_half(0) | of_half(1) << 8);
}
template <int kMode>
__m512 roundscale_ps(__m512 v) {
    static_assert(kMode >> 4 == 0, "only integers are implemented");
    return by_halves([](auto x) { return _mm256_round_ps(x, kMode); }, v);
}
inline float scale(float x, float by) {
    if (x != x || by != by) return by == __builtin_inff() ? by : by == -__builtin_inff() ? 0.0f : x + by;
    // In float64 the product is exact, and 2^400 times a float is more than any float, or 0.
    const double limited = by > 400.0f ? 400.0 : by < -400.0f ? -400.0 : __builtin_floor((double)by);
    const uint64_t bits = (uint64_t)(1023 + (int)limited) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    if (__builtin_isinf(by)) power = by > 0 ? __builtin_inf() : 0.0;
    return (float)(x * power);
}
inline __m512 scalef_ps(__m512 v, __m512 by) {
    Numbers<float> numbers(v);
    const Numbers<float> exponents(by);
    for (int i = 0; i < 16; i++) numbers.at[i] = scale(numbers.at[i], exponents.at[i]);
    return join(_mm256_loadu_ps(numbers.at), _mm256_loadu_ps(numbers.at + 8));
}
inline __m512 rcp14_ps(__m512 v) {
    const auto rounded = [](auto x) {
        const __m256i bits = _mm256_castps_si256(_mm256_div_ps(_mm256_set1_ps(1.0f), x));
        return _mm256_castsi256_ps(_mm256_and_si256(_mm256_add_epi32(bits, _mm256_set1_epi32(0x200)), _mm256_set1_epi32(~0x3ff)));
    };
    return by_halves(rounded, v);
}

// function(first half, second half), until one number is left: the order of GCC's own reductions.
template <typename Number, typename Vector, typename Function>
Number reduce(Vector v, Function function) {
    Numbers<Number> numbers(v);
    for (int count = 8; count; count /= 2)
        for (int i = 0; i < count; i++) numbers.at[i] = function(numbers.at[i], numbers.at[i + count]);
    return numbers.at[0];
}
inline float reduce_add_ps(__m512 v) {
    return reduce<float>(v, [](float a, float b) { return a + b; });
}
inline float reduce_max_ps(__m512 v) {
    return reduce<float>(v, [](float a, float b) { return a > b ? a : b; });
}
inline int reduce_add_epi32(__m512i v) {
    return (int)reduce<uint32_t>(v, [](uint32_t a, uint32_t b) { return a + b; });
}
inline int reduce_max_epi32(__m512i v) {
    return reduce<int32_t>(v, [](int32_t a, int32_t b) { return a > b ? a : b; });
}

// AVX-VNNI and AVX512-VNNI.
inline __m256i dpbusd_avx_epi32(__m256i total, __m256i a, __m256i b) {
    // Even and odd bytes in 16 bits, whose pairs of products madd sums in 32 bits.
    const __m256i even_a = _mm256_and_si256(a, _mm256_set1_epi16(255)), odd_a = _mm256_srli_epi16(a, 8);
    const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd_b = _mm256_srai_epi16(b, 8);
    const __m256i even = _mm256_madd_epi16(even_a, even_b), odd = _mm256_madd_epi16(odd_a, odd_b);
    return _mm256_add_epi32(total, _mm256_add_epi32(even, odd));
}
inline __m512i dpbusd_epi32(__m512i total, __m512i a, __m512i b) {
    return by_halves([](auto sum, auto x, auto y) { return dpbusd_avx_epi32(sum, x, y); }, total, a, b);
}
inline __m512i dpwssd_epi32(__m512i total, __m512i a, __m512i b) {
    return by_halves([](auto sum, auto x, auto y) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)); }, total, a, b);
}

// AVX512-BF16.
inline __m256 flush_denormals(__m256 x) {
    const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f)), magnitude = _mm256_xor_ps(x, sign);
    return _mm256_blendv_ps(x, sign, _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ));
}
inline __m512 dpbf16_ps(__m512 total, __m512bh a, __m512bh b) {
    const auto low = [](auto x) { return flush_denormals(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))); };
    const auto high = [](auto x) {
        return flush_denormals(_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000))));
    };
    const auto add = [&](auto sum, auto x, auto y) {
        const __m256 odd = flush_denormals(_mm256_fmadd_ps(high(x), high(y), flush_denormals(sum)));
        return flush_denormals(_mm256_fmadd_ps(low(x), low(y), odd));
    };
    return by_halves(add, total, (__m512i)a, (__m512i)b);
}
inline __m256i rounded_bf16(__m256 number) {
    const __m256 x = flush_denormals(number);
    const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    const __m256i almost_half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, almost_half), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256bh cvtneps_pbh(__m512 v) {
    // Each half of the register is packed on its own: the quarters are put into their order.
    const __m256i packed = _mm256_packus_epi32(rounded_bf16(half(v, 0)), rounded_bf16(half(v, 1)));
    return (__m256bh)_mm256_permute4x64_epi64(packed, 0xd8);
}
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
    return (__m512bh)join((__m256i)cvtneps_pbh(low), (__m256i)cvtneps_pbh(high));
}

}  // namespace avx512_emulation

#ifdef TRITONLM_EMULATES_AVX_VNNI
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 avx512_emulation::dpbusd_avx_epi32
#endif

#ifdef TRITONLM_EMULATES_BF16
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#define _mm512_cvtne2ps_pbh avx512_emulation::cvtne2ps_pbh
#define _mm512_cvtneps_pbh avx512_emulation::cvtneps_pbh
#define _mm512_dpbf16_ps avx512_emulation::dpbf16_ps
#define _mm512_dpbusd_epi32 avx512_emulation::dpbusd_epi32
#define _mm512_dpwssd_epi32 avx512_emulation::dpwssd_epi32
#endif

#ifdef TRITONLM_EMULATES_AVX512
// Without optimization some are macros.
#undef _mm512_slli_epi16
#undef _mm512_srli_epi16
#undef _mm512_cmp_ps_mask
#undef _mm512_roundscale_ps
#undef _mm512_ternarylogic_epi32
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512CD__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define _mm512_abs_epi8 avx512_emulation::abs_epi8
#define _mm512_and_si512 avx512_emulation::and_si512
#define _mm512_broadcast_i32x4 avx512_emulation::broadcast_i32x4
#define _mm512_cvtepi32_epi8 avx512_emulation::cvtepi32_epi8
#define _mm512_cvtepi32_ps avx512_emulation::cvtepi32_ps
#define _mm512_cvtepi8_epi16 avx512_emulation::cvtepi8_epi16
#define _mm512_cvtepi8_epi32 avx512_emulation::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 avx512_emulation::cvtepu16_epi32
#define _mm512_cvtph_ps avx512_emulation::cvtph_ps
#define _mm512_fmadd_ps avx512_emulation::fmadd_ps
#define _mm512_loadu_si512 avx512_emulation::loadu_si512
#define _mm512_madd_epi16 avx512_emulation::madd_epi16
#define _mm512_maddubs_epi16 avx512_emulation::maddubs_epi16
#define _mm512_mask_loadu_epi16 avx512_emulation::mask_loadu_epi16
#define _mm512_mask_storeu_epi16 avx512_emulation::mask_storeu_epi16
#define _mm512_mask_sub_epi8 avx512_emulation::mask_sub_epi8
#define _mm512_min_ps avx512_emulation::min_ps
#define _mm512_movepi8_mask avx512_emulation::movepi8_mask
#define _mm512_rcp14_ps avx512_emulation::rcp14_ps
#define _mm512_reduce_add_epi32 avx512_emulation::reduce_add_epi32
#define _mm512_reduce_add_ps avx512_emulation::reduce_add_ps
#define _mm512_reduce_max_epi32 avx512_emulation::reduce_max_epi32
#define _mm512_reduce_max_ps avx512_emulation::reduce_max_ps
#define _mm512_scalef_ps avx512_emulation::scalef_ps
#define _mm512_set1_epi16 avx512_emulation::set1_epi16
#define _mm512_set1_epi32 avx512_emulation::set1_epi32
#define _mm512_set1_epi8 avx512_emulation::set1_epi8
#define _mm512_set1_ps avx512_emulation::set1_ps
#define _mm512_setzero_si512 avx512_emulation::setzero_si512
#define _mm512_shuffle_epi8 avx512_emulation::shuffle_epi8
#define _mm512_slli_epi16 avx512_emulation::slli_epi16
#define _mm512_srli_epi16 avx512_emulation::srli_epi16
#define _mm512_storeu_si512 avx512_emulation::storeu_si512
#define _mm512_sub_epi8 avx512_emulation::sub_epi8
#define _mm512_unpackhi_epi8 avx512_emulation::unpackhi_epi8
#define _mm512_unpacklo_epi8 avx512_emulation::unpacklo_epi8
#define _mm512_xor_si512 avx512_emulation::xor_si512
#define _mm512_cmp_ps_mask(a, b, predicate) avx512_emulation::cmp_ps_mask<predicate>(a, b)
#define _mm512_roundscale_ps(v, mode) avx512_emulation::roundscale_ps<mode>(v)
#define _mm512_ternarylogic_epi32(a, b, c, table) avx512_emulation::ternarylogic_epi32<table>(a, b, c)
#endif
