// Weights of bfloat16 in twelve bits each, without loss. A matrix's numbers are of few sizes: fifteen exponents and zero
// cover all but one or two in ten thousand, so that four bits name a number's exponent, and eight hold its sign and its
// fraction. The others, strays, are listed. Reading weights is what a small batch waits for: it reads a quarter less.
//
// Weights lie as in gemm.hpp, in tiles of thirty-two inputs of sixteen outputs. Of each tile first the signs and
// fractions, 512 bytes, and then the codes, two in a byte, 256: in such an order that whole vectors of bytes are
// interleaved to vectors of numbers. Nothing here knows of rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "lanes.hpp"

constexpr int kTileInputs = 32, kTileWeights = kTileInputs * kLanes, kTightTile = kTileWeights / 2 * 3;
constexpr int kCodes = 16, kZeroCode = kCodes - 1;

// A weight whose exponent has no code: its place in its block of outputs, and its bits.
struct Stray {
    uint32_t place;
    uint16_t bits;
};

// The exponents that codes stand for: the highest one, those below it, and zero.
inline int exponent_of(int highest, int code) { return code == kZeroCode ? 0 : highest - code; }

// Codes looked up: sixteen upper bytes of a number without its sign, and sixteen lower ones without its fraction.
struct CodeBook {
    alignas(16) uint8_t upper[kCodes], lower[kCodes];
    explicit CodeBook(int highest) {
        for (int code = 0; code < kCodes; code++) {
            const int exponent = exponent_of(highest, code);
            upper[code] = (uint8_t)(exponent >> 1);
            lower[code] = (uint8_t)(exponent << 7);
        }
    }
};

#ifdef __AVX512BW__
// What comes so many tiles later is asked for now: memory answers late.
constexpr int kAskedAhead = 3;

inline __m512i four_times(const uint8_t* from) { return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)from)); }

// One of two, bit by bit.
inline __m512i choose(__m512i which, __m512i one, __m512i other) { return _mm512_ternarylogic_epi32(which, one, other, 0xca); }

inline void expand(const uint8_t* from, const CodeBook& book, bf16* to) {
    const __m512i upper = four_times(book.upper), lower = four_times(book.lower);
    const __m512i sign = _mm512_set1_epi8(-128), four_bits = _mm512_set1_epi8(15);
    const char* later = (const char*)from + kAskedAhead * kTightTile;
    for (int line = 0; line < kTightTile; line += 64) _mm_prefetch(later + line, _MM_HINT_T0);
    for (int i = 0; i < kTileWeights; i += 64) {
        // The codes of two words lie in one.
        const __m512i both = _mm512_loadu_si512(from + kTileWeights + i / 128 * 64);
        const __m512i codes = _mm512_and_si512(i % 128 ? _mm512_srli_epi16(both, 4) : both, four_bits);
        const __m512i rest = _mm512_loadu_si512(from + i);
        const __m512i high = choose(sign, rest, _mm512_shuffle_epi8(upper, codes));
        const __m512i low = choose(sign, _mm512_shuffle_epi8(lower, codes), rest);
        _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
        _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
    }
}
#else
inline void expand(const uint8_t* from, const CodeBook& book, bf16* to) {
    typedef uint8_t Sixteen __attribute__((vector_size(16)));
    const Sixteen one = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, other = one + 8;
    Sixteen upper, lower;
    memcpy(&upper, book.upper, sizeof upper);
    memcpy(&lower, book.lower, sizeof lower);
    for (int i = 0; i < kTileWeights; i += 16) {
        // The codes of two words, of four such each, lie in one.
        Sixteen both, rest;
        memcpy(&both, from + kTileWeights + i / 128 * 64 + i % 64, sizeof both);
        memcpy(&rest, from + i, sizeof rest);
        const Sixteen codes = i % 128 < 64 ? both & 15 : both >> 4;
        const Sixteen high = (rest & 128) | __builtin_shuffle(upper, codes);
        const Sixteen low = (rest & 127) | __builtin_shuffle(lower, codes);
        const Sixteen first = __builtin_shuffle(low, high, one), second = __builtin_shuffle(low, high, other);
        bf16* found = to + i / 64 * 64 + i % 64 / 2;
        memcpy(found, &first, sizeof first);
        memcpy(found + 32, &second, sizeof second);
    }
}
#endif

// The highest of fifteen neighbouring exponents that cover most of these numbers. A sample tells: whatever is chosen,
// nothing is lost.
inline int highest_exponent(const uint16_t* from, size_t count) {
    constexpr int kSampled = 1 << 16, kWindow = kCodes - 1, kExponents = 256;
    size_t found[kExponents] = {}, covered = 0, most = 0;
    // An odd step, so that all outputs have their turn.
    for (size_t i = 0, step = count / kSampled | 1; i < count; i += step) found[from[i] >> 7 & 255]++;
    int best = kWindow;
    for (int highest = 1; highest < kExponents; highest++) {
        covered += found[highest] - (highest > kWindow ? found[highest - kWindow] : 0);
        if (highest >= kWindow && covered > most) most = covered, best = highest;
    }
    return best;
}

// One tile; whether there are strays among its numbers.
inline bool tighten_tile(const uint16_t* from, int highest, uint8_t* to) {
    typedef uint16_t Line __attribute__((vector_size(2 * kTileInputs)));
    typedef uint8_t Half __attribute__((vector_size(kTileInputs)));
    uint8_t codes[kTileWeights];
    Line strays = {};
    for (int i = 0; i < kTileWeights; i += kTileInputs) {
        Line line;
        memcpy(&line, from + i, sizeof line);
        const Line exponent = line >> 7 & 255, below = (uint16_t)highest - exponent;
        const Line code = exponent == 0 ? Line{} + kZeroCode : below;
        strays |= (Line)((exponent != 0) & (below >= (uint16_t)kZeroCode));
        const Half rest = __builtin_convertvector((line >> 8 & 128) | (line & 127), Half);
        const Half of_line = __builtin_convertvector(code, Half);
        for (int lane = 0; lane < 4; lane++) {
            const int at = i / 64 * 64 + lane * 16 + i / 32 % 2 * 8;
            memcpy(to + at, (const char*)&rest + lane * 8, 8);
            memcpy(codes + at, (const char*)&of_line + lane * 8, 8);
        }
    }
    for (int i = 0; i < kTileWeights / 2; i++) {
        const int word = i / 64 * 128 + i % 64;
        to[kTileWeights + i] = (uint8_t)((codes[word] & 15) | codes[word + 64] << 4);
    }
    uint16_t any = 0;
    for (int i = 0; i < kTileInputs; i++) any |= strays[i];
    return any;
}

// All of a matrix, and where each block's strays begin; how many strays there are, or -1 where they are more than `most`.
inline int64_t tighten(
    const uint16_t* from, int blocks, int inputs, int highest, uint8_t* to, Stray* strays, int64_t* begins, int64_t most
) {
    int64_t count = 0;
    for (int block = 0; block < blocks; block++) {
        begins[block] = count;
        for (int place = 0; place < inputs * kLanes; place += kTileWeights, from += kTileWeights, to += kTightTile) {
            if (!tighten_tile(from, highest, to)) continue;
            for (int i = 0; i < kTileWeights; i++) {
                const int exponent = from[i] >> 7 & 255;
                if (exponent == 0 || (exponent <= highest && exponent > highest - kZeroCode)) continue;
                if (count == most) return -1;
                strays[count++] = {(uint32_t)(place + i), from[i]};
            }
        }
    }
    begins[blocks] = count;
    return count;
}
