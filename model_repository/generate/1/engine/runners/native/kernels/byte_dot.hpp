// One step of an integer sum: the signed codes of 16 outputs for four inputs, times a row's bytes of those inputs.
//   total[o] += sum over i < 4 of code[o][i] * (x[i] - kOffset)
//
// Layout: CodeBytes (grouped_form.hpp). kWide: codes may be -128 to 127, else -63 to 63. x is 1 to 255.
// ISA variants: __AVX512VNNI__ and __AVXVNNI__ use vpdpbusd; __AVX512BW__ and __AVX2__ vpmaddubsw; otherwise compiler vectors.
// Test: tests/inference/test_grouped.py.
#pragma once

#include "grouped_form.hpp"
#include "simd.hpp"

inline int32_t load_four(const uint8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}

constexpr int kFourOnes = 0x01010101;

#if defined(__AVX512VNNI__)
// vpdpbusd multiplies unsigned by signed bytes.
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = 0;
    __m512i codes;
    explicit ByteDot(const CodeBytes& codes) : codes(codes.bytes) {}
    void add(Reg16i& total, const uint8_t* row) const { add_four(total, load_four(row)); }
    void add_codes(Reg16i& total) const { add_four(total, kFourOnes); }

  private:
    void add_four(Reg16i& total, int four) const {
        total = (Vec16i)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(four), codes);
    }
};
#elif defined(__AVX512BW__)
// vpmaddubsw's sums of two products saturate at 16 bits: 2 * 255 * 63 fits, 2 * 255 * 128 does not. So of wide codes |code| is
// multiplied by x - 128 with the sign of the code: 2 * 128 * 127 fits.
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = kWide ? 128 : 0;
    __m512i codes, magnitudes;
    __mmask64 negative = 0;
    explicit ByteDot(const CodeBytes& codes) : codes(codes.bytes), magnitudes(_mm512_abs_epi8(codes.bytes)) {
        if (kWide) negative = _mm512_movepi8_mask(codes.bytes);
    }
    void add(Reg16i& total, const uint8_t* row) const {
        __m512i numbers = _mm512_set1_epi32(load_four(row));
        if constexpr (!kWide) return add_pairs(total, _mm512_maddubs_epi16(numbers, codes));
        numbers = _mm512_xor_si512(numbers, _mm512_set1_epi8(-128));
        numbers = _mm512_mask_sub_epi8(numbers, negative, _mm512_setzero_si512(), numbers);
        add_pairs(total, _mm512_maddubs_epi16(magnitudes, numbers));
    }
    void add_codes(Reg16i& total) const { add_pairs(total, _mm512_maddubs_epi16(_mm512_set1_epi8(1), codes)); }

  private:
    static void add_pairs(Reg16i& total, __m512i pairs) { total += (Vec16i)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
};
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = 0;
    __m256i codes[2];
    explicit ByteDot(const CodeBytes& from) : codes{from.bytes[0], from.bytes[1]} {}
    void add(Reg16i& total, const uint8_t* row) const { add_four(total, load_four(row)); }
    void add_codes(Reg16i& total) const { add_four(total, kFourOnes); }

  private:
    void add_four(Reg16i& total, int four) const {
        const __m256i numbers = _mm256_set1_epi32(four);
        for (int i = 0; i < 2; i++)
            total.regs[i] = (RegInt)_mm256_dpbusd_avx_epi32((__m256i)total.regs[i], numbers, codes[i]);
    }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
// As with AVX-512, with vpsignb.
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = kWide ? 128 : 0;
    __m256i codes[2], magnitudes[2];
    explicit ByteDot(const CodeBytes& from) {
        for (int i = 0; i < 2; i++) {
            codes[i] = from.bytes[i];
            magnitudes[i] = _mm256_abs_epi8(codes[i]);
        }
    }
    void add(Reg16i& total, const uint8_t* row) const {
        const __m256i numbers = _mm256_set1_epi32(load_four(row)), centred = _mm256_xor_si256(numbers, _mm256_set1_epi8(-128));
        for (int i = 0; i < 2; i++)
            add_pairs(total, i, kWide ? _mm256_maddubs_epi16(magnitudes[i], _mm256_sign_epi8(centred, codes[i]))
                                      : _mm256_maddubs_epi16(numbers, codes[i]));
    }
    void add_codes(Reg16i& total) const {
        for (int i = 0; i < 2; i++) add_pairs(total, i, _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes[i]));
    }

  private:
    static void add_pairs(Reg16i& total, int i, __m256i pairs) {
        total.regs[i] += (RegInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
};
#else
template <bool kWide>
struct ByteDot {
    static constexpr int kOffset = 0;
    Vec16i codes[4];
    explicit ByteDot(const CodeBytes& from) {
        Vec16i four;
        memcpy(&four, &from, sizeof four);
        // Byte i of each 32 bits, sign-extended.
        for (int i = 0; i < 4; i++) codes[i] = (four << (24 - 8 * i)) >> 24;
    }
    void add(Reg16i& total, const uint8_t* row) const { add_four(total, row); }
    void add_codes(Reg16i& total) const {
        const uint8_t ones[] = {1, 1, 1, 1};
        add_four(total, ones);
    }

  private:
    void add_four(Reg16i& total, const uint8_t* row) const {
        Vec16i sum;
        memcpy(&sum, &total, sizeof sum);
        for (int i = 0; i < 4; i++) sum += codes[i] * row[i];
        memcpy(&total, &sum, sizeof total);
    }
};
#endif
