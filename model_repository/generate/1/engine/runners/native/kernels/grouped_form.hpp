// Weights in groups: w = scale * (code - zero) + minimum, with a scale (and a minimum) for each 16 or 32 inputs of an output.
// It reads scales, and unpacks codes of 2, 3, 4, 5, 6 or 8 bits in registers.
//
// Layout of a block of 16 outputs: a record for each 64 inputs, to a multiple of which they are padded with zero scales:
//   scales   [64 / group][16] in float16, then minima likewise; whole cache lines
//   nibbles  [8][16][4] bytes for 4 bits and more: bits 0-3 of a byte are input 8 j + i, bits 4-7 input 8 j + 4 + i
//   pairs    [4][16][4] bytes for 2, 3 and 6 bits: bits 2 s and 2 s + 1 of a byte are the next two bits of input 16 q + 4 s + i
//   highest  [2][16][4] bytes for 3 and 5 bits: bit s of a byte is the highest bit of input 32 h + 4 s + i
//   bytes    [16][16][4] for 8 bits, in place of all these: code - zero
// In two levels (as K-quants have them) scales and minima are integers of 8 bits, or with `pairs` of 4 bits in one byte, the minimum
// in the high ones. Before every fourth record a line holds the float16 factors [16] of the scales and of the minima; inputs are
// padded to a multiple of 256.
// ISA variants: __AVX512BW__, __AVX2__, or loops that the compiler vectorizes. Test: tests/inference/test_grouped.py.
// It knows no activation rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd.hpp"

// Inputs of a record, of a factor of two levels, of a group of a row (grouped_rows.hpp), and of a step.
constexpr int kRecordInputs = 64, kSuperInputs = 256, kRowGroup = 32, kStepInputs = 4, kStepBytes = kStepInputs * kVecSize;

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && (defined(__AVX512BW__) || !(defined(__AVXVNNI__) || defined(__AVX512F__)))
// vpmaddubsw multiplies bytes (byte_dot.hpp): unsigned codes by a row's signed bytes, which are less by kByteMiddle, or signed codes
// by its unsigned ones.
#define TRITONLM_BYTE_PAIRS
constexpr int kByteMiddle = 128;
#else
constexpr int kByteMiddle = 0;
#endif

// How codes lie in a record.
enum class Codes { k2, k3, k4, kTable, k5, k6, k8 };
constexpr int bits_of(Codes codes) {
    constexpr int kBits[] = {2, 3, 4, 4, 5, 6, 8};
    return kBits[(int)codes];
}
// Whether codes are unsigned when they are multiplied, and minima are less by the zero times the scale: a product for each row, which
// for passes of few rows takes less time than subtracting the zero from codes. Those of 3 and 6 bits, which GGUF has without minima and
// in groups of 16, would take two products for a row's group; those of 2 bits have minima anyway.
constexpr bool are_unsigned(Codes codes) {
    return (kByteMiddle || kAccumulators < 16) && (codes == Codes::k2 || codes == Codes::k4 || codes == Codes::k5);
}
// Codes as which some are multiplied, and the largest magnitude of those.
constexpr Codes multiplied_as(Codes codes) {
    if (!kByteMiddle || codes == Codes::kTable) return Codes::k8;
    return codes == Codes::k2 ? Codes::k4 : codes;
}
constexpr int largest_of(Codes codes) {
    constexpr int kLargest[] = {3, 7, 15, 128, 31, 32, 128};
    return kLargest[(int)codes];
}

struct GroupedForm {
    int32_t bits, group, two_level, has_minima, pairs;
    int32_t zero, has_table;
    // Of 4-bit codes with `has_table`: the number that a code stands for.
    int8_t table[16];
    // Bytes: of a record; from its beginning to the minima and to the codes. complete() computes these and the next two.
    int32_t record_bytes, minima_offset, codes_offset;
    // What codes are not less by once they are unpacked: minima are, times the scales. And whether there are minima then.
    int32_t minima_zero, adds_minima;

    Codes codes() const {
        switch (bits) {
            case 2: return Codes::k2;
            case 3: return Codes::k3;
            case 4: return has_table ? Codes::kTable : Codes::k4;
            case 5: return Codes::k5;
            case 6: return Codes::k6;
            default: return Codes::k8;
        }
    }

    void complete() {
        minima_offset = kRecordInputs / group * kVecSize * (two_level ? 1 : 2);
        codes_offset = (minima_offset * (1 + (has_minima && !pairs)) + kCacheLine - 1) / kCacheLine * kCacheLine;
        record_bytes = codes_offset + kRecordInputs * kVecSize * bits / 8;
        minima_zero = are_unsigned(codes()) ? zero : 0;
        adds_minima = has_minima || minima_zero;
    }

    // Of the record of the inputs from k on, a multiple of 64.
    size_t record_offset(unsigned k) const {
        const size_t headers = two_level ? (k / kSuperInputs + 1) * kCacheLine : 0;
        return (size_t)(k / kRecordInputs) * record_bytes + headers;
    }
};

// The inputs that are multiplied, with those that pad a record.
inline int padded_inputs(const GroupedForm& form, int inputs) {
    const int multiple = form.two_level ? kSuperInputs : kRecordInputs;
    return (inputs + multiple - 1) / multiple * multiple;
}

// Of a block with this many inputs.
inline size_t grouped_block_bytes(const GroupedForm& form, int inputs) {
    const size_t padded = padded_inputs(form, inputs), headers = form.two_level ? padded / kSuperInputs : 0;
    return padded / kRecordInputs * form.record_bytes + headers * kCacheLine;
}

struct GroupedBlock {
    const uint8_t* data;
    const GroupedForm* form;
};

inline Reg16 load_halves(const uint8_t* from) {
#ifdef __AVX512F__
    return (Vec16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    const __m128i* const halves = reinterpret_cast<const __m128i*>(from);
    return {(Reg)_mm256_cvtph_ps(_mm_loadu_si128(halves)), (Reg)_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
#else
    Reg16 result;
    for (int i = 0; i < kRegsPerVec; i++) {
        RegHalf halves;
        memcpy(&halves, from + i * sizeof halves, sizeof halves);
        // The exponent's bias is 112 less than float32's, for denormals too.
        const RegUint bits = __builtin_convertvector(halves, RegUint);
        const Reg magnitudes = (Reg)((bits & 0x7fff) << 13) * 0x1p112f;
        result.regs[i] = (Reg)((RegUint)magnitudes | (bits & 0x8000) << 16);
    }
    return result;
#endif
}

inline Reg16i low_nibbles(const Reg16i& bytes) {
    return map_ints([](auto reg) { return reg & 15; }, bytes);
}
inline Reg16i high_nibbles(const Reg16i& bytes) {
    return map_ints([](auto reg) { return reg >> 4 & 15; }, bytes);
}

// Of a chunk of inputs: scales and minima of its groups, [inputs / group], and the sums of the weights of each 32 inputs.
struct GroupScales {
    float scale[kSuperInputs / 16][kVecSize], minimum[kSuperInputs / 16][kVecSize], weight_sum[kSuperInputs / kRowGroup][kVecSize];
};

// Of at most 256 inputs from k on, a multiple of 64 (in two levels of 256). One function for all: its results are the same bits
// in each pass. It leaves the sums of weights.
__attribute__((noinline)) inline void load_scales(const GroupedForm& form, const uint8_t* block, int k, int count, GroupScales& to) {
    const unsigned per_record = form.group == 16 ? 4 : 2;
    const float zero = (float)form.minima_zero;
    Reg16 factor = {}, minimum_factor = {};
    if (form.two_level) {
        const uint8_t* header = block + form.record_offset(k) - kCacheLine;
        factor = load_halves(header);
        minimum_factor = load_halves(header + kCacheLine / 2);
    }
    const uint8_t* from = block + form.record_offset(k);
    for (unsigned number = 0; number < count / kRecordInputs * per_record; from += form.record_bytes)
        for (unsigned i = 0; i < per_record; i++, number++) {
            const uint8_t* minima = from + form.minima_offset;
            Reg16 scale, minimum = {};
            if (form.two_level) {
                const Reg16i bytes = load_bytes(from + i * kVecSize);
                scale = to_floats(form.pairs ? low_nibbles(bytes) : bytes) * factor;
                if (form.pairs) minimum = to_floats(high_nibbles(bytes)) * minimum_factor;
                else if (form.has_minima) minimum = to_floats(load_bytes(minima + i * kVecSize)) * minimum_factor;
            } else {
                scale = load_halves(from + 2 * i * kVecSize);
                if (form.has_minima) minimum = load_halves(minima + 2 * i * kVecSize);
            }
            store(to.scale[number], scale);
            store(to.minimum[number], zero ? minimum + -zero * scale : minimum);
        }
}

// 64 bytes: the codes of four inputs of 16 outputs.
#ifdef __AVX512BW__
struct CodeBytes {
    __m512i bytes;

    static CodeBytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
    void store(uint8_t* to) const { _mm512_storeu_si512(to, bytes); }
    static CodeBytes zero() { return {_mm512_setzero_si512()}; }
    CodeBytes low_nibbles() const { return {_mm512_and_si512(bytes, _mm512_set1_epi8(15))}; }
    CodeBytes high_nibbles() const { return {_mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15))}; }
    CodeBytes minus(int value) const { return {_mm512_sub_epi8(bytes, _mm512_set1_epi8((char)value))}; }
    CodeBytes look_up(const int8_t* table) const {
        const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        return {_mm512_shuffle_epi8(values, bytes)};
    }
    // Sets the bits of `mask`, which are 0, to those of `plane`, shifted to the right, or to the left by -right.
    CodeBytes add_bits(const CodeBytes& plane, int right, int mask) const {
        const __m512i shifted = right < 0 ? _mm512_slli_epi16(plane.bytes, -right) : _mm512_srli_epi16(plane.bytes, right);
        constexpr int kFirstOrBothOthers = 0xf8;
        return {_mm512_ternarylogic_epi32(bytes, shifted, _mm512_set1_epi8((char)mask), kFirstOrBothOthers)};
    }
};
#elif defined(__AVX2__)
struct CodeBytes {
    __m256i bytes[2];

    template <typename Function>
    static CodeBytes map(Function function) {
        return {{function(0), function(1)}};
    }
    static CodeBytes load(const uint8_t* from) {
        return map([&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i); });
    }
    void store(uint8_t* to) const {
        for (int i = 0; i < 2; i++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, bytes[i]);
    }
    static CodeBytes zero() { return map([](int) { return _mm256_setzero_si256(); }); }
    CodeBytes low_nibbles() const { return map([&](int i) { return _mm256_and_si256(bytes[i], _mm256_set1_epi8(15)); }); }
    CodeBytes high_nibbles() const {
        return map([&](int i) { return _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), _mm256_set1_epi8(15)); });
    }
    CodeBytes minus(int value) const {
        return map([&](int i) { return _mm256_sub_epi8(bytes[i], _mm256_set1_epi8((char)value)); });
    }
    CodeBytes look_up(const int8_t* table) const {
        const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        return map([&](int i) { return _mm256_shuffle_epi8(values, bytes[i]); });
    }
    CodeBytes add_bits(const CodeBytes& plane, int right, int mask) const {
        return map([&](int i) {
            const __m256i from = plane.bytes[i], shifted = right < 0 ? _mm256_slli_epi16(from, -right) : _mm256_srli_epi16(from, right);
            return _mm256_or_si256(bytes[i], _mm256_and_si256(shifted, _mm256_set1_epi8((char)mask)));
        });
    }
};
#else
struct CodeBytes {
    uint8_t bytes[kStepBytes];

    template <typename Function>
    static CodeBytes map(Function function) {
        CodeBytes result;
        for (int i = 0; i < kStepBytes; i++) result.bytes[i] = (uint8_t)function(i);
        return result;
    }
    static CodeBytes load(const uint8_t* from) {
        return map([&](int i) { return from[i]; });
    }
    void store(uint8_t* to) const { memcpy(to, bytes, sizeof bytes); }
    static CodeBytes zero() { return {}; }
    CodeBytes low_nibbles() const {
        return map([&](int i) { return bytes[i] & 15; });
    }
    CodeBytes high_nibbles() const {
        return map([&](int i) { return bytes[i] >> 4; });
    }
    CodeBytes minus(int value) const {
        return map([&](int i) { return bytes[i] - value; });
    }
    CodeBytes look_up(const int8_t* table) const {
        return map([&](int i) { return table[bytes[i]]; });
    }
    CodeBytes add_bits(const CodeBytes& plane, int right, int mask) const {
        return map([&](int i) { return bytes[i] | ((right < 0 ? plane.bytes[i] << -right : plane.bytes[i] >> right) & mask); });
    }
};
#endif

// The codes of inputs 8 j to 8 j + 7 of half a record, whose codes begin at `from`; less the form's zero, unless minima are.
template <Codes kCodes>
__attribute__((always_inline)) inline void unpack_codes(
    const GroupedForm& form, const uint8_t* from, size_t half, size_t j, CodeBytes& first, CodeBytes& second
) {
    constexpr int kBits = bits_of(kCodes), kLow = kBits / 4 * 4, kSteps = kRowGroup / kStepInputs;
    if constexpr (kBits == 8) {
        first = CodeBytes::load(from + (half * kSteps + 2 * j) * kStepBytes);
        second = CodeBytes::load(from + (half * kSteps + 2 * j + 1) * kStepBytes);
        return;
    }
    first = second = CodeBytes::zero();
    if constexpr (kLow) {
        const CodeBytes both = CodeBytes::load(from + (half * kSteps / 2 + j) * kStepBytes);
        first = both.low_nibbles();
        second = both.high_nibbles();
        from += kSteps * kStepBytes;
    }
    if constexpr (kCodes == Codes::kTable) {
        first = first.look_up(form.table);
        second = second.look_up(form.table);
        return;
    }
    // Bits of 4 or 8 steps lie in one byte.
    const auto add = [&](int bits, int to) __attribute__((always_inline)) {
        const size_t steps = 8 / bits, step = 2 * j % steps;
        const CodeBytes plane = CodeBytes::load(from + (half * kSteps / steps + 2 * j / steps) * kStepBytes);
        const int mask = ((1 << bits) - 1) << to;
        first = first.add_bits(plane, (int)step * bits - to, mask);
        second = second.add_bits(plane, (int)(step + 1) * bits - to, mask);
        from += 2 * kSteps / steps * kStepBytes;
    };
    if constexpr (kBits % 4 >= 2) add(2, kLow);
    if constexpr (kBits % 2) add(1, kBits - 1);
    if (are_unsigned(kCodes)) return;
    first = first.minus(form.zero);
    second = second.minus(form.zero);
}

// Calls `task(std::integral_constant<int, ...>)` for the form's group.
template <typename Task>
auto with_group(const GroupedForm& form, Task task) {
    if (form.group == 16) return task(std::integral_constant<int, 16>());
    return task(std::integral_constant<int, 32>());
}

// Calls `task(std::integral_constant<Codes, ...>)` for the form's codes.
template <typename Task>
auto with_codes(const GroupedForm& form, Task task) {
    switch (form.codes()) {
        case Codes::k2: return task(std::integral_constant<Codes, Codes::k2>());
        case Codes::k3: return task(std::integral_constant<Codes, Codes::k3>());
        case Codes::k4: return task(std::integral_constant<Codes, Codes::k4>());
        case Codes::kTable: return task(std::integral_constant<Codes, Codes::kTable>());
        case Codes::k5: return task(std::integral_constant<Codes, Codes::k5>());
        case Codes::k6: return task(std::integral_constant<Codes, Codes::k6>());
        default: return task(std::integral_constant<Codes, Codes::k8>());
    }
}
