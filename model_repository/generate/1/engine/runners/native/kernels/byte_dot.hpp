// Steps of an integer sum: the codes of 16 outputs for four inputs, times a row's bytes of those inputs.
//   total[o] = sum over steps, and over i < 4 of  code[o][i] * x[i]
//
// Layout: CodeBytes (grouped_form.hpp). x is 1 to 255, less kByteMiddle.
// ISA variants: __AVX512VNNI__ and __AVXVNNI__ use vpdpbusd; __AVX512BW__ and __AVX2__ vpmaddubsw; otherwise compiler vectors.
// Test: tests/inference/test_grouped.py.
#pragma once

#include <type_traits>

#include "fma.hpp"
#include "grouped_form.hpp"
#include "grouped_rows.hpp"
#include "simd.hpp"

inline int32_t load_four(const uint8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}

#ifdef TRITONLM_BYTE_PAIRS
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

// How many steps, 1, 2, 4 or 8 and at most those of a group, add up to no more than `limit`, where one adds up to `step`.
constexpr int steps_within(int limit, int step, int group) {
    int steps = group / kStepInputs;
    while (steps * step > limit) steps /= 2;
    return steps;
}

// The codes of a step. Unsigned ones are multiplied by signed rows, small signed ones by unsigned rows, and the magnitudes of signed
// bytes by signed rows with the bytes' signs.
template <Codes kCodes, int kGroup>
struct ByteDot {
    static constexpr bool kUnsigned = are_unsigned(kCodes), kBytes = kCodes == Codes::k8, kUnsignedRows = !kUnsigned && !kBytes;
    static constexpr int kLargest = largest_of(kCodes), kLargestNumber = kUnsignedRows ? UINT8_MAX : INT8_MAX;
    ByteReg codes[kByteRegs], magnitudes[kByteRegs];

    explicit ByteDot(const CodeBytes& from) {
        for (int i = 0; i < kByteRegs; i++) {
            codes[i] = bytes_of(from, i);
            if (kBytes) magnitudes[i] = magnitudes_of(codes[i]);
        }
    }

    struct Sum : StepSum<int16_t, steps_within(INT16_MAX, 2 * kLargestNumber * kLargest, kGroup)> {
        TRITONLM_INLINE void add_step(const ByteDot& dot, const uint8_t* row, int step) {
            const ByteReg numbers = repeat_four(row);
            const auto product = [&](int i) {
                if (kBytes) return multiply_pairs(dot.magnitudes[i], with_signs(numbers, dot.codes[i]));
                return kUnsigned ? multiply_pairs(dot.codes[i], numbers) : multiply_pairs(numbers, dot.codes[i]);
            };
            this->add(step, product, [](ByteReg pairs) { return pairs; });
        }
    };

    // Of the codes themselves: of steps in bytes, or, if they are bytes, as pairs in 16 bits.
    typedef std::conditional_t<kUnsigned, uint8_t, int8_t> Byte;
    typedef std::conditional_t<
        kBytes, StepSum<int16_t, steps_within(INT16_MAX, 2 * kLargest, kGroup)>,
        StepSum<Byte, steps_within(kUnsigned ? UINT8_MAX : INT8_MAX + 1, kLargest, kGroup)>> CodeSteps;
    struct CodeSum : CodeSteps {
        TRITONLM_INLINE void add_step(const ByteDot& dot, int step) {
            const auto pairs = [](ByteReg bytes) {
                return kUnsigned ? multiply_pairs(bytes, all_bytes(1)) : multiply_pairs(all_bytes(1), bytes);
            };
            if constexpr (kBytes) this->add(step, [&](int i) { return pairs(dot.codes[i]); }, [](ByteReg sums) { return sums; });
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
template <Codes, int>
struct ByteDot : ByteProduct {
    static constexpr bool kUnsignedRows = false;
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

// Calls `task(std::integral_constant<Codes, ...>)` for the codes as which these are multiplied.
template <typename Task>
void with_products(Codes codes, Task task) {
    switch (multiplied_as(codes)) {
#ifdef TRITONLM_BYTE_PAIRS
        case Codes::k3: return task(std::integral_constant<Codes, Codes::k3>());
        case Codes::k4: return task(std::integral_constant<Codes, Codes::k4>());
        case Codes::k5: return task(std::integral_constant<Codes, Codes::k5>());
        case Codes::k6: return task(std::integral_constant<Codes, Codes::k6>());
#endif
        default: return task(std::integral_constant<Codes, Codes::k8>());
    }
}
