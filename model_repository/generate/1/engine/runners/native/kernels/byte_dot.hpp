// Steps of an integer sum: the signed codes of 16 outputs for four inputs, times a row's bytes of those inputs.
//   total[o] = sum over steps, and over i < 4 of  code[o][i] * (x[i] - kOffset)
//
// Layout: CodeBytes (grouped_form.hpp). x is 1 to 255, and codes are at most kLargest in magnitude.
// ISA variants: __AVX512VNNI__ and __AVXVNNI__ use vpdpbusd; __AVX512BW__ and __AVX2__ vpmaddubsw; otherwise compiler vectors.
// Test: tests/inference/test_grouped.py.
#pragma once

#include <type_traits>

#include "fma.hpp"
#include "grouped_form.hpp"
#include "simd.hpp"

inline int32_t load_four(const uint8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && (defined(__AVX512BW__) || !(defined(__AVXVNNI__) || defined(__AVX512F__)))
// vpmaddubsw multiplies unsigned by signed bytes and adds two neighbouring products in 16 bits, in which some steps fit.
#ifdef __AVX512BW__
typedef __m512i ByteReg;
inline ByteReg all_bytes(int value) { return _mm512_set1_epi8((char)value); }
inline ByteReg repeat_four(const uint8_t* from) { return _mm512_set1_epi32(load_four(from)); }
inline ByteReg magnitudes_of(ByteReg codes) { return _mm512_abs_epi8(codes); }
inline ByteReg multiply_pairs(ByteReg numbers, ByteReg codes) { return _mm512_maddubs_epi16(numbers, codes); }
inline ByteReg add_neighbours(ByteReg pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
inline ByteReg with_signs(ByteReg numbers, ByteReg codes) {
    return _mm512_mask_sub_epi8(numbers, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), numbers);
}
constexpr int kByteRegs = 1;
inline void in_register(ByteReg&) {}
inline ByteReg bytes_of(const CodeBytes& codes, int) { return codes.bytes; }
inline ByteReg& reg_of(Reg16i& total, int) { return reinterpret_cast<ByteReg&>(total); }
#else
typedef __m256i ByteReg;
inline ByteReg all_bytes(int value) { return _mm256_set1_epi8((char)value); }
inline ByteReg repeat_four(const uint8_t* from) { return _mm256_set1_epi32(load_four(from)); }
inline ByteReg magnitudes_of(ByteReg codes) { return _mm256_abs_epi8(codes); }
inline ByteReg multiply_pairs(ByteReg numbers, ByteReg codes) { return _mm256_maddubs_epi16(numbers, codes); }
inline ByteReg add_neighbours(ByteReg pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
inline ByteReg with_signs(ByteReg numbers, ByteReg codes) { return _mm256_sign_epi8(numbers, codes); }
constexpr int kByteRegs = 2;
// With few registers the compiler would compute the terms of a sum first, and keep them in memory.
inline void in_register(ByteReg& sum) { asm("" : "+x"(sum)); }
inline ByteReg bytes_of(const CodeBytes& codes, int i) { return codes.bytes[i]; }
inline ByteReg& reg_of(Reg16i& total, int i) { return reinterpret_cast<ByteReg&>(total.regs[i]); }
#endif
template <typename Number>
ByteReg add_as(ByteReg a, ByteReg b) {
    typedef Number Numbers __attribute__((vector_size(sizeof(ByteReg))));
    return (ByteReg)((Numbers)a + (Numbers)b);
}

// Sums of 32 bits of what fits into 16 bits for kSteps steps, and into `Number` before that.
template <typename Number, int kSteps>
struct StepSum {
    ByteReg some[kByteRegs];
    Reg16i total;

    // `step` counts from the beginning of a group, which is a multiple of kSteps.
    template <typename Term, typename Pairs>
    TRITONLM_INLINE void add(int step, Term term, Pairs pairs) {
#pragma GCC unroll 2
        for (int i = 0; i < kByteRegs; i++) {
            some[i] = step % kSteps ? add_as<Number>(some[i], term(i)) : term(i);
            in_register(some[i]);
            if ((step + 1) % kSteps) continue;
            const ByteReg sum = add_neighbours(pairs(some[i]));
            reg_of(total, i) = step < kSteps ? sum : add_as<int32_t>(reg_of(total, i), sum);
        }
    }
};

// The codes of a step. Products of codes that are larger than 63 do not fit into 16 bits as they are: |code| is multiplied by
// x - 128 with the sign of the code.
template <int kLargest>
struct ByteDot {
    static constexpr int kOffset = kLargest > 63 ? 128 : 0;
    ByteReg codes[kByteRegs], magnitudes[kByteRegs];

    explicit ByteDot(const CodeBytes& from) {
        for (int i = 0; i < kByteRegs; i++) {
            codes[i] = bytes_of(from, i);
            if (kOffset) magnitudes[i] = magnitudes_of(codes[i]);
        }
    }

    struct Sum : StepSum<int16_t, kOffset ? 1 : INT16_MAX / (2 * UINT8_MAX * kLargest)> {
        TRITONLM_INLINE void add_step(const ByteDot& dot, const uint8_t* row, int step) {
            const ByteReg numbers = repeat_four(row), centred = (ByteReg)(numbers ^ all_bytes(-128));
            const auto product = [&](int i) {
                return kOffset ? multiply_pairs(dot.magnitudes[i], with_signs(centred, dot.codes[i]))
                               : multiply_pairs(numbers, dot.codes[i]);
            };
            this->add(step, product, [](ByteReg pairs) { return pairs; });
        }
    };

    // Of the codes themselves: of four steps in bytes, if they are small, else as pairs in 16 bits.
    typedef std::conditional_t<kOffset != 0, StepSum<int16_t, 4>, StepSum<int8_t, 4>> CodeSteps;
    struct CodeSum : CodeSteps {
        TRITONLM_INLINE void add_step(const ByteDot& dot, int step) {
            const auto pairs = [](ByteReg bytes) { return multiply_pairs(all_bytes(1), bytes); };
            if constexpr (kOffset) this->add(step, [&](int i) { return pairs(dot.codes[i]); }, [](ByteReg sums) { return sums; });
            else this->add(step, [&](int i) { return dot.codes[i]; }, pairs);
        }
    };
};
#else
#if defined(__AVX512VNNI__)
// vpdpbusd multiplies unsigned by signed bytes, and adds four products.
struct ByteProduct {
    __m512i codes;
    explicit ByteProduct(const CodeBytes& from) : codes(from.bytes) {}
    void add(Reg16i& total, const uint8_t* four) const {
        total = (Vec16i)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(load_four(four)), codes);
    }
};
#elif defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512F__)
struct ByteProduct {
    __m256i codes[2];
    explicit ByteProduct(const CodeBytes& from) : codes{from.bytes[0], from.bytes[1]} {}
    void add(Reg16i& total, const uint8_t* four) const {
        const __m256i numbers = _mm256_set1_epi32(load_four(four));
        for (int i = 0; i < 2; i++) total.regs[i] = (RegInt)_mm256_dpbusd_avx_epi32((__m256i)total.regs[i], numbers, codes[i]);
    }
};
#else
struct ByteProduct {
    Vec16i codes[4];
    explicit ByteProduct(const CodeBytes& from) {
        Vec16i four;
        memcpy(&four, &from, sizeof four);
        // Byte i of each 32 bits, sign-extended.
        for (int i = 0; i < 4; i++) codes[i] = (four << (24 - 8 * i)) >> 24;
    }
    void add(Reg16i& total, const uint8_t* four) const {
        Vec16i sum;
        memcpy(&sum, &total, sizeof sum);
        for (int i = 0; i < 4; i++) sum += codes[i] * four[i];
        memcpy(&total, &sum, sizeof total);
    }
};
#endif
template <int>
struct ByteDot : ByteProduct {
    static constexpr int kOffset = 0;
    using ByteProduct::ByteProduct;

    struct Sum {
        Reg16i total;
        TRITONLM_INLINE void add_step(const ByteDot& dot, const uint8_t* row, int step) {
            if (!step) total = Reg16i{};
            dot.add(total, row);
        }
    };
    struct CodeSum : Sum {
        TRITONLM_INLINE void add_step(const ByteDot& dot, int step) {
            constexpr uint8_t kOnes[] = {1, 1, 1, 1};
            Sum::add_step(dot, kOnes, step);
        }
    };
};
#endif

// Calls `task(std::integral_constant<int, ...>)` for the largest magnitude of codes; once for all where it makes no difference.
template <typename Task>
void with_largest(Codes codes, Task task) {
    const int largest = ByteDot<128>::kOffset ? largest_of(codes) : 128;
    if (largest == 128) return task(std::integral_constant<int, 128>());
    if constexpr (ByteDot<128>::kOffset) {
        if (largest == 32) task(std::integral_constant<int, 32>());
        else task(std::integral_constant<int, 15>());
    }
}
