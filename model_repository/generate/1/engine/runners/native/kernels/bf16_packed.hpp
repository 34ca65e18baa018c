// Lossless 12-bit bfloat16: a 4-bit exponent code, and 8 bits of sign and fraction. A matrix's exponents lie close together:
// 15 of them and zero cover all weights but one or two in ten thousand. The others, outliers, are listed with their index.
// A small batch waits for weights to be read from memory; 12 bits are a quarter less to read than 16.
//
// Layout: tiles of [32 inputs / 2][16 outputs][2] weights in gemm.hpp's order, 768 bytes for 512 weights:
//   bytes [0, 512)    sign and fraction of each weight
//   bytes [512, 768)  codes, two in a byte: byte 512 + 64 g + j holds the code of byte 128 g + j in its low half, and that of
//                     byte 128 g + 64 + j in its high half
// Within 64 weights, byte 16 q + 8 h + b holds weight 32 h + 8 q + b, so that unpacklo and unpackhi of (low bytes, high
// bytes) give weights in order.
// exponent(code) = max_exponent - code for code < 15, and 0 for code 15.
//
// ISA variants: __AVX512BW__ unpacks 64 weights at a time; otherwise compiler vectors unpack 16. Without __SSSE3__ (pshufb,
// a byte table lookup) nothing is packed. The runner packs with AVX-512 only (bf16_packed_pays in kernels.cpp).
// Test: tests/inference/test_bf16_packed.py, bit for bit. It knows weights, not activations.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "simd.hpp"

constexpr int kTileInputs = 32, kTileWeights = kTileInputs * kVecSize, kPackedTileBytes = kTileWeights / 2 * 3;
constexpr int kCodes = 16, kZeroCode = kCodes - 1;
// bfloat16: 1 bit of sign, 8 of exponent, 7 of fraction.
constexpr int kFractionBits = 7, kExponents = 256, kExponentMask = kExponents - 1, kFractionMask = 127, kSignBit = 128;

// A weight whose exponent has no code: its index in its block of outputs, and its bits.
struct Outlier {
    uint32_t index;
    uint16_t bits;
};

inline int exponent_of(int max_exponent, int code) { return code == kZeroCode ? 0 : max_exponent - code; }

// code -> bits 14..8 of a bfloat16 (`high`), and its bit 7 (`low`): the exponent without sign and fraction.
struct ExponentTable {
    alignas(16) uint8_t high[kCodes], low[kCodes];
    explicit ExponentTable(int max_exponent) {
        for (int code = 0; code < kCodes; code++) {
            const int exponent = exponent_of(max_exponent, code);
            high[code] = (uint8_t)(exponent >> 1);
            low[code] = (uint8_t)(exponent << 7);
        }
    }
};

#ifdef __AVX512BW__
// Tiles from the one that is unpacked to the one that is prefetched, to hide the memory's latency.
constexpr int kPrefetchTiles = 3;

inline __m512i broadcast_table(const uint8_t* table) {
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table));
}

// mask ? one : other, bit by bit.
inline __m512i select_bits(__m512i mask, __m512i one, __m512i other) {
    constexpr int kMux = 0xca;
    return _mm512_ternarylogic_epi32(mask, one, other, kMux);
}

inline void unpack_tile(const uint8_t* from, const ExponentTable& table, bf16* to) {
    const __m512i high_table = broadcast_table(table.high), low_table = broadcast_table(table.low);
    const __m512i sign = _mm512_set1_epi8(-128), nibble = _mm512_set1_epi8(15);
    const char* later = (const char*)from + kPrefetchTiles * kPackedTileBytes;
    for (int line = 0; line < kPackedTileBytes; line += 64) _mm_prefetch(later + line, _MM_HINT_T0);
    for (int i = 0; i < kTileWeights; i += 64) {
        const __m512i two_codes = _mm512_loadu_si512(from + kTileWeights + i / 128 * 64);
        const __m512i codes = _mm512_and_si512(i % 128 ? _mm512_srli_epi16(two_codes, 4) : two_codes, nibble);
        const __m512i sign_fraction = _mm512_loadu_si512(from + i);
        const __m512i high = select_bits(sign, sign_fraction, _mm512_shuffle_epi8(high_table, codes));
        const __m512i low = select_bits(sign, _mm512_shuffle_epi8(low_table, codes), sign_fraction);
        _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
        _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
    }
}
#else
inline void unpack_tile(const uint8_t* from, const ExponentTable& table, bf16* to) {
    typedef uint8_t Bytes16 __attribute__((vector_size(16)));
    const Bytes16 low_halves = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high_halves = low_halves + 8;
    Bytes16 high_table, low_table;
    memcpy(&high_table, table.high, sizeof high_table);
    memcpy(&low_table, table.low, sizeof low_table);
    for (int i = 0; i < kTileWeights; i += 16) {
        Bytes16 two_codes, sign_fraction;
        memcpy(&two_codes, from + kTileWeights + i / 128 * 64 + i % 64, sizeof two_codes);
        memcpy(&sign_fraction, from + i, sizeof sign_fraction);
        const Bytes16 codes = i % 128 < 64 ? two_codes & 15 : two_codes >> 4;
        const Bytes16 high = (sign_fraction & kSignBit) | __builtin_shuffle(high_table, codes);
        const Bytes16 low = (sign_fraction & kFractionMask) | __builtin_shuffle(low_table, codes);
        const Bytes16 first = __builtin_shuffle(low, high, low_halves), second = __builtin_shuffle(low, high, high_halves);
        bf16* target = to + i / 64 * 64 + i % 64 / 2;
        memcpy(target, &first, sizeof first);
        memcpy(target + 32, &second, sizeof second);
    }
}
#endif

// The highest of 15 neighbouring exponents that cover the most weights of a sample. Any choice is lossless.
inline int choose_max_exponent(const uint16_t* from, size_t count) {
    constexpr int kSampled = 1 << 16, kWindow = kCodes - 1;
    size_t histogram[kExponents] = {}, covered = 0, most = 0;
    // An odd step reaches all outputs: weights of one output are a power of two apart.
    for (size_t i = 0, step = count / kSampled | 1; i < count; i += step) histogram[from[i] >> kFractionBits & kExponentMask]++;
    int best = kWindow;
    for (int exponent = 1; exponent < kExponents; exponent++) {
        covered += histogram[exponent] - (exponent > kWindow ? histogram[exponent - kWindow] : 0);
        if (exponent >= kWindow && covered > most) most = covered, best = exponent;
    }
    return best;
}

// Packs a tile. Returns whether it has outliers.
inline bool pack_tile(const uint16_t* from, int max_exponent, uint8_t* to) {
    typedef uint16_t Line __attribute__((vector_size(2 * kTileInputs)));
    typedef uint8_t LineBytes __attribute__((vector_size(kTileInputs)));
    uint8_t codes[kTileWeights];
    Line outliers = {};
    for (int i = 0; i < kTileWeights; i += kTileInputs) {
        Line line;
        memcpy(&line, from + i, sizeof line);
        const Line exponent = line >> kFractionBits & kExponentMask, below_max = (uint16_t)max_exponent - exponent;
        const Line code = exponent == 0 ? Line{} + kZeroCode : below_max;
        outliers |= (Line)((exponent != 0) & (below_max >= (uint16_t)kZeroCode));
        const LineBytes sign_fraction = __builtin_convertvector((line >> 8 & kSignBit) | (line & kFractionMask), LineBytes);
        const LineBytes line_codes = __builtin_convertvector(code, LineBytes);
        for (int quarter = 0; quarter < 4; quarter++) {
            const int target = i / 64 * 64 + quarter * 16 + i / 32 % 2 * 8;
            memcpy(to + target, (const char*)&sign_fraction + quarter * 8, 8);
            memcpy(codes + target, (const char*)&line_codes + quarter * 8, 8);
        }
    }
    for (int i = 0; i < kTileWeights / 2; i++) {
        const int low = i / 64 * 128 + i % 64;
        to[kTileWeights + i] = (uint8_t)((codes[low] & 15) | codes[low + 64] << 4);
    }
    uint16_t any = 0;
    for (int i = 0; i < kTileInputs; i++) any |= outliers[i];
    return any;
}

// Packs a matrix. Block n's outliers are outliers[offsets[n]] to outliers[offsets[n + 1] - 1]. Returns their number, or -1 if
// there are more than `limit`.
inline int64_t pack_bf16(
    const uint16_t* from, int blocks, int inputs, int max_exponent, uint8_t* to, Outlier* outliers, int64_t* offsets,
    int64_t limit
) {
    int64_t count = 0;
    for (int block = 0; block < blocks; block++) {
        offsets[block] = count;
        for (int index = 0; index < inputs * kVecSize; index += kTileWeights, from += kTileWeights, to += kPackedTileBytes) {
            if (!pack_tile(from, max_exponent, to)) continue;
            for (int i = 0; i < kTileWeights; i++) {
                const int exponent = from[i] >> kFractionBits & kExponentMask;
                if (exponent == 0 || (exponent <= max_exponent && exponent > max_exponent - kZeroCode)) continue;
                if (count == limit) return -1;
                outliers[count++] = {(uint32_t)(index + i), from[i]};
            }
        }
    }
    offsets[blocks] = count;
    return count;
}
