// Weights in groups: w = scale * (code - zero) + minimum, with a scale (and a minimum) for each 16 or 32 inputs of an output.
// It reads scales, and unpacks codes of 2, 3, 4, 5, 6 or 8 bits in registers.
//
// Layout of a block of 16 outputs: a record for each 64 inputs, to a multiple of which they are padded with zero scales:
//   scales   [64 / group][16] in float16, then minima likewise; whole cache lines
//   nibbles  [8][16][4] bytes for 4 bits and more: bits 0-3 of a byte are input 8 j + i, bits 4-7 input 8 j + 4 + i
//   pairs    [4][16][4] bytes for 2, 3 and 6 bits: bits 2 s and 2 s + 1 of a byte are the next two bits of input 16 q + 4 s + i
//   masks    [16] of 64 bits for 3 and 5 bits: bit 4 o + i of mask s is the highest bit of input 4 s + i of output o
//   bytes    [16][16][4] for 8 bits, in place of all these
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

struct GroupedForm {
    int32_t bits, group, two_level, has_minima, pairs;
    float zero;
    int32_t has_table;
    // Of 4-bit codes with `has_table`: the byte that a code stands for, 128 + its value.
    uint8_t table[16];
    // Bytes: of a record; from its beginning to the minima and to the codes. set_sizes computes them.
    int32_t record_bytes, minima_offset, codes_offset;

    void set_sizes() {
        minima_offset = kRecordInputs / group * kVecSize * (two_level ? 1 : 2);
        codes_offset = (minima_offset * (1 + (has_minima && !pairs)) + kCacheLine - 1) / kCacheLine * kCacheLine;
        record_bytes = codes_offset + kRecordInputs * kVecSize * bits / 8;
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

// How codes lie in a record.
enum class Codes { k2, k3, k4, kTable, k5, k6, k8 };
constexpr int bits_of(Codes codes) {
    constexpr int kBits[] = {2, 3, 4, 4, 5, 6, 8};
    return kBits[(int)codes];
}
// Whether the magnitudes of signed codes may exceed 63.
constexpr bool is_wide(Codes codes) { return codes == Codes::k8 || codes == Codes::kTable; }

inline Codes codes_of(const GroupedForm& form) {
    switch (form.bits) {
        case 2: return Codes::k2;
        case 3: return Codes::k3;
        case 4: return form.has_table ? Codes::kTable : Codes::k4;
        case 5: return Codes::k5;
        case 6: return Codes::k6;
        default: return Codes::k8;
    }
}

inline Reg16 load_halves(const uint8_t* from) {
#ifdef __AVX512F__
    return (Vec16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
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
            store(to.minimum[number], minimum);
        }
}

// 64 bytes: the codes of four inputs of 16 outputs, signed when they are unpacked.
#ifdef __AVX512BW__
struct CodeBytes {
    __m512i bytes;

    static CodeBytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
    void store(uint8_t* to) const { _mm512_storeu_si512(to, bytes); }
    static CodeBytes zero() { return {_mm512_setzero_si512()}; }
    CodeBytes low_nibbles() const { return {_mm512_and_si512(bytes, _mm512_set1_epi8(15))}; }
    CodeBytes high_nibbles() const { return {_mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15))}; }
    CodeBytes minus(int value) const { return {_mm512_sub_epi8(bytes, _mm512_set1_epi8((char)value))}; }
    CodeBytes look_up(const uint8_t* table) const {
        const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        return {_mm512_shuffle_epi8(values, bytes)};
    }
    // Sets bits `to` and `to` + 1, which are 0, to pair number `pair` of each byte of `pairs`.
    CodeBytes add_pair(const CodeBytes& pairs, int pair, int to) const {
        const int right = 2 * pair - to;
        const __m512i shifted = right < 0 ? _mm512_slli_epi16(pairs.bytes, -right) : _mm512_srli_epi16(pairs.bytes, right);
        constexpr int kFirstOrBothOthers = 0xf8;
        return {_mm512_ternarylogic_epi32(bytes, shifted, _mm512_set1_epi8((char)(3 << to)), kFirstOrBothOthers)};
    }
    // Adds `value` to the bytes whose bit is set.
    CodeBytes add_mask(const uint8_t* mask, int value) const {
        uint64_t bits;
        memcpy(&bits, mask, sizeof bits);
        return {_mm512_mask_add_epi8(bytes, bits, bytes, _mm512_set1_epi8((char)value))};
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
    CodeBytes look_up(const uint8_t* table) const {
        const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        return map([&](int i) { return _mm256_shuffle_epi8(values, bytes[i]); });
    }
    CodeBytes add_pair(const CodeBytes& pairs, int pair, int to) const {
        const int right = 2 * pair - to;
        return map([&](int i) {
            const __m256i from = pairs.bytes[i], shifted = right < 0 ? _mm256_slli_epi16(from, -right) : _mm256_srli_epi16(from, right);
            return _mm256_or_si256(bytes[i], _mm256_and_si256(shifted, _mm256_set1_epi8((char)(3 << to))));
        });
    }
    CodeBytes add_mask(const uint8_t* mask, int value) const {
        // Byte n of 32 gets byte n / 8 of the mask, of which it tests bit n % 8.
        const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
        return map([&](int i) {
            int32_t bits;
            memcpy(&bits, mask + 4 * i, sizeof bits);
            const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), places);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
            return _mm256_add_epi8(bytes[i], _mm256_and_si256(set, _mm256_set1_epi8((char)value)));
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
    CodeBytes look_up(const uint8_t* table) const {
        return map([&](int i) { return table[bytes[i]]; });
    }
    CodeBytes add_pair(const CodeBytes& pairs, int pair, int to) const {
        return map([&](int i) { return bytes[i] | (pairs.bytes[i] >> 2 * pair & 3) << to; });
    }
    CodeBytes add_mask(const uint8_t* mask, int value) const {
        return map([&](int i) { return bytes[i] + (mask[i / 8] >> i % 8 & 1) * value; });
    }
};
#endif

// The codes of inputs 8 j to 8 j + 7 of a record, whose codes begin at `from`, less the form's zero.
template <Codes kCodes>
__attribute__((always_inline)) inline void unpack_codes(
    const GroupedForm& form, const uint8_t* from, unsigned j, CodeBytes& first, CodeBytes& second
) {
    constexpr int kBits = bits_of(kCodes);
    first = second = CodeBytes::zero();
    if constexpr (kBits == 8) {
        first = CodeBytes::load(from + 2 * j * kStepBytes);
        second = CodeBytes::load(from + (2 * j + 1) * kStepBytes);
    } else if constexpr (kBits >= 4) {
        const CodeBytes both = CodeBytes::load(from + j * kStepBytes);
        first = both.low_nibbles();
        second = both.high_nibbles();
        from += kRecordInputs / 8 * kStepBytes;
    }
    if constexpr (kBits % 4 >= 2) {
        constexpr int kStepsPerPairs = 4;
        const CodeBytes pairs = CodeBytes::load(from + 2 * j / kStepsPerPairs * kStepBytes);
        first = first.add_pair(pairs, 2 * j % kStepsPerPairs, kBits / 4 * 4);
        second = second.add_pair(pairs, (2 * j + 1) % kStepsPerPairs, kBits / 4 * 4);
        from += kRecordInputs / kStepInputs / kStepsPerPairs * kStepBytes;
    }
    if constexpr (kBits % 2) {
        const uint8_t* masks = from + 2 * j * sizeof(uint64_t);
        first = first.add_mask(masks, 1 << (kBits - 1));
        second = second.add_mask(masks + sizeof(uint64_t), 1 << (kBits - 1));
    }
    if constexpr (kCodes == Codes::kTable) {
        first = first.look_up(form.table);
        second = second.look_up(form.table);
    }
    const int zero = (int)form.zero;
    first = first.minus(zero);
    second = second.minus(zero);
}

// Calls `task(std::integral_constant<Codes, ...>)` for the form's codes.
template <typename Task>
auto with_codes(const GroupedForm& form, Task task) {
    switch (codes_of(form)) {
        case Codes::k2: return task(std::integral_constant<Codes, Codes::k2>());
        case Codes::k3: return task(std::integral_constant<Codes, Codes::k3>());
        case Codes::k4: return task(std::integral_constant<Codes, Codes::k4>());
        case Codes::kTable: return task(std::integral_constant<Codes, Codes::kTable>());
        case Codes::k5: return task(std::integral_constant<Codes, Codes::k5>());
        case Codes::k6: return task(std::integral_constant<Codes, Codes::k6>());
        default: return task(std::integral_constant<Codes, Codes::k8>());
    }
}
