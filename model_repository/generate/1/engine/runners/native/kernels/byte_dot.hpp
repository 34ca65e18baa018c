// One step of an integer sum: the bytes of 16 outputs for four inputs, times a row's int8 numbers of those inputs.
//   total[o] += sum over i < 4 of (byte[o][i] - kOffset) * x[i]
//
// Layout: CodeBytes (grouped_form.hpp). kWide: bytes may exceed 127, up to 255. x is -127 to 127.
// ISA variants: __AVX512VNNI__ and __AVXVNNI__ use vpdpbusd; __AVX512BW__ and __AVX2__ vpmaddubsw; otherwise compiler vectors.
// Test: tests/inference/test_grouped.py.
#pragma once

#include "grouped_form.hpp"
#include "simd.hpp"

inline int32_t load_four(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}

#if defined(__AVX512VNNI__)
// vpdpbusd multiplies unsigned by signed bytes.
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = 0;
    __m512i bytes;
    explicit ByteDot(const CodeBytes& codes) : bytes(codes.bytes) {}
    void add(Reg16i& total, const int8_t* row) const {
        total = (Vec16i)_mm512_dpbusd_epi32((__m512i)total, bytes, _mm512_set1_epi32(load_four(row)));
    }
};
#elif defined(__AVX512BW__)
// vpmaddubsw's sums of two products saturate at 16 bits: 2 * 127 * 127 fits, 2 * 255 * 127 does not. Wide bytes are made
// signed, and |w| is multiplied by x with the sign of w.
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = kWide ? 128 : 0;
    __m512i magnitudes;
    __mmask64 negative = 0;
    explicit ByteDot(const CodeBytes& codes) : magnitudes(codes.bytes) {
        if constexpr (!kWide) return;
        const __m512i with_sign = _mm512_xor_si512(codes.bytes, _mm512_set1_epi8(-128));
        magnitudes = _mm512_abs_epi8(with_sign);
        negative = _mm512_movepi8_mask(with_sign);
    }
    void add(Reg16i& total, const int8_t* row) const {
        __m512i numbers = _mm512_set1_epi32(load_four(row));
        if constexpr (kWide) numbers = _mm512_mask_sub_epi8(numbers, negative, _mm512_setzero_si512(), numbers);
        total += (Vec16i)_mm512_madd_epi16(_mm512_maddubs_epi16(magnitudes, numbers), _mm512_set1_epi16(1));
    }
};
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = 0;
    __m256i bytes[2];
    explicit ByteDot(const CodeBytes& codes) : bytes{codes.bytes[0], codes.bytes[1]} {}
    void add(Reg16i& total, const int8_t* row) const {
        const __m256i numbers = _mm256_set1_epi32(load_four(row));
        for (int i = 0; i < 2; i++)
            total.regs[i] = (RegInt)_mm256_dpbusd_avx_epi32((__m256i)total.regs[i], bytes[i], numbers);
    }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
// As with AVX-512, with vpsignb.
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = kWide ? 128 : 0;
    __m256i bytes[2], magnitudes[2];
    explicit ByteDot(const CodeBytes& codes) {
        for (int i = 0; i < 2; i++) {
            bytes[i] = kWide ? _mm256_xor_si256(codes.bytes[i], _mm256_set1_epi8(-128)) : codes.bytes[i];
            magnitudes[i] = kWide ? _mm256_abs_epi8(bytes[i]) : bytes[i];
        }
    }
    void add(Reg16i& total, const int8_t* row) const {
        const __m256i numbers = _mm256_set1_epi32(load_four(row)), ones = _mm256_set1_epi16(1);
        for (int i = 0; i < 2; i++) {
            const __m256i with_sign = kWide ? _mm256_sign_epi8(numbers, bytes[i]) : numbers;
            total.regs[i] += (RegInt)_mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes[i], with_sign), ones);
        }
    }
};
#else
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = 0;
    Vec16i bytes[4];
    explicit ByteDot(const CodeBytes& codes) {
        Vec16i four;
        memcpy(&four, &codes, sizeof four);
        for (int i = 0; i < 4; i++) bytes[i] = four >> 8 * i & 255;
    }
    void add(Reg16i& total, const int8_t* row) const {
        Vec16i sum;
        memcpy(&sum, &total, sizeof sum);
        for (int i = 0; i < 4; i++) sum += bytes[i] * row[i];
        memcpy(&total, &sum, sizeof total);
    }
};
#endif

// What ByteDot subtracts from unpacked codes of this kind.
inline float offset_of(Codes codes) {
    return is_wide(codes) ? ByteDot<true>::kOffset : ByteDot<false>::kOffset;
}
