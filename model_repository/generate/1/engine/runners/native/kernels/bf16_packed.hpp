// Lossless 12-bit bfloat16: a 4-bit exponent code, and 8 bits of sign and fraction. A matrix's exponents lie close together:
// 15 of them and zero cover all weights but one or two in ten thousand. The others, outliers, are listed with their index.
// A small batch waits for weights to be read from memory; 12 bits are a quarter less to read than 16.
//
// Layout: tiles of [32 inputs / 2][16 outputs][2] weights in gemm.hpp's order, 768 bytes for 512 weights, of which each 128 are 192
// bytes:
//   bytes [0, 64)    codes, two in a byte: byte j holds the code of byte 64 + j in its low half, and that of byte 128 + j in its
//                    high half
//   bytes [64, 192)  sign and fraction of each weight
// Within 64 weights, byte 16 q + 8 h + b holds weight 32 h + 8 q + b, so that unpacklo and unpackhi of (low bytes, high
// bytes) give weights in order. Bytes are read one after the other, as the processor's own prefetching expects.
// exponent(code) = max_exponent - code for code < 15, and 0 for code 15.
//
// ISA variants: __AVX512BW__ unpacks 64 weights at a time, __AVX2__ unpacks 32; without a byte table lookup in whole registers
// nothing is packed. Where packing pays is measured (packing_pays.hpp).
// Test: tests/inference/test_bf16_packed.py, bit for bit. It knows weights, not activations.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// AVX512F without AVX512BW has no byte instructions for its registers.
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define TRITONLM_UNPACKS
#include <immintrin.h>
#endif

#include "prefetch.hpp"
#include "simd.hpp"

constexpr int kTileInputs = 32, kTileWeights = kTileInputs * kVecSize, kPackedTileBytes = kTileWeights / 2 * 3;
// Weights of a part of a tile, the bytes of their codes, and all their bytes.
constexpr int kPartWeights = 128, kPartCodes = kPartWeights / 2, kPartBytes = kPartCodes + kPartWeights;
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

// A line in registers: 32 weights, two inputs of 16 outputs, as they lie in memory.
#ifdef __AVX512F__
typedef Vec16u Line;
#else
typedef RegGroup<RegUint, Vec16u> Line;
#endif
constexpr int kLineWeights = 2 * kVecSize, kTileLines = kTileWeights / kLineWeights, kTileParts = kTileWeights / kPartWeights;

inline Line load_line(const bf16* from) {
    Line line;
#ifdef __AVX512F__
    memcpy(&line, from, sizeof line);
#else
    for (int i = 0; i < kRegsPerVec; i++) memcpy(&line.regs[i], from + 2 * i * kRegSize, sizeof line.regs[i]);
#endif
    return line;
}

// The outliers of a tile by lines: which weights they are, and their bits at those weights' places.
struct TileOutliers {
    uint32_t masks[kTileLines] = {};
    alignas(64) bf16 bits[kTileWeights];

    void add(unsigned weight, uint16_t number) {
        masks[weight / kLineWeights] |= 1u << weight % kLineWeights;
        bits[weight].bits = number;
    }
    void clear() { memset(masks, 0, sizeof masks); }

    // Replaces the outliers of line n. In registers: a line that is stored for it is loaded again only when its stores are complete.
    void insert(int n, Line& line) const {
#ifdef __AVX512BW__
        line = (Line)_mm512_mask_loadu_epi16((__m512i)line, masks[n], bits + n * kLineWeights);
#else
        for (unsigned left = masks[n]; left; left &= left - 1) {
            const int weight = __builtin_ctz(left);
            memcpy((bf16*)&line + weight, bits + n * kLineWeights + weight, sizeof(bf16));
        }
#endif
    }
};

// Bytes between weights that are read and those that are prefetched, where the processor's own prefetching does not suffice:
// it stops at the end of a page.
constexpr int kPrefetchAhead = 6144;

#ifdef TRITONLM_UNPACKS
constexpr bool kCanUnpack = true;

// Unpacks lines 2 * half and 2 * half + 1 of a part of a tile into registers.
#ifdef __AVX512BW__
struct LineUnpacker {
    __m512i high_table, low_table;

    explicit LineUnpacker(const ExponentTable& table)
        : high_table(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table.high))),
          low_table(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table.low))) {}

    void unpack(const uint8_t* part, int half, Line& first, Line& second) const {
        // The first operand, which is overwritten, where `sign` is 0, and where it is 1; elsewhere the second.
        constexpr int kUnlessSign = 0xd8, kIfSign = 0xe4;
        const __m512i sign = _mm512_set1_epi8(-128), nibble = _mm512_set1_epi8(15);
        const __m512i two_codes = _mm512_loadu_si512(part);
        const __m512i codes = _mm512_and_si512(half ? _mm512_srli_epi16(two_codes, 4) : two_codes, nibble);
        const __m512i sign_fraction = _mm512_loadu_si512(part + kPartCodes + half * 64);
        const __m512i high = _mm512_ternarylogic_epi32(
            _mm512_shuffle_epi8(high_table, codes), sign_fraction, sign, kUnlessSign);
        const __m512i low = _mm512_ternarylogic_epi32(
            _mm512_shuffle_epi8(low_table, codes), sign_fraction, sign, kIfSign);
        first = (Line)_mm512_unpacklo_epi8(low, high);
        second = (Line)_mm512_unpackhi_epi8(low, high);
    }
};
#else
struct LineUnpacker {
    __m256i high_table, low_table;

    explicit LineUnpacker(const ExponentTable& table)
        : high_table(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.high))),
          low_table(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.low))) {}

    void unpack(const uint8_t* part, int half, Line& first, Line& second) const {
        const __m256i sign = _mm256_set1_epi8(-128), nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
        for (int n = 0; n < kRegsPerVec; n++) {
            const __m256i two_codes = _mm256_loadu_si256((const __m256i*)(part + n * 32));
            const __m256i codes = _mm256_and_si256(half ? _mm256_srli_epi16(two_codes, 4) : two_codes, nibble);
            const __m256i sign_fraction = _mm256_loadu_si256((const __m256i*)(part + kPartCodes + half * 64 + n * 32));
            const __m256i high = _mm256_or_si256(
                _mm256_and_si256(sign, sign_fraction), _mm256_shuffle_epi8(high_table, codes));
            const __m256i low = _mm256_or_si256(
                _mm256_andnot_si256(sign, sign_fraction), _mm256_shuffle_epi8(low_table, codes));
            first.regs[n] = (RegUint)_mm256_unpacklo_epi8(low, high);
            second.regs[n] = (RegUint)_mm256_unpackhi_epi8(low, high);
        }
    }
};
#endif

template <bool kPrefetches>
void unpack_tile(const uint8_t* from, const ExponentTable& table, bf16* to) {
    const LineUnpacker unpacker(table);
    if (kPrefetches) prefetch<kPackedTileBytes, 1>(from + kPrefetchAhead);
    for (int i = 0; i < kTileParts; i++)
        for (int half = 0; half < 2; half++) {
            Line first, second;
            bf16* target = to + (4 * i + 2 * half) * kLineWeights;
            unpacker.unpack(from + i * kPartBytes, half, first, second);
            memcpy(target, &first, sizeof first);
            memcpy(target + kLineWeights, &second, sizeof second);
        }
}
#else
constexpr bool kCanUnpack = false;
template <bool>
void unpack_tile(const uint8_t*, const ExponentTable&, bf16*) {}
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
            uint8_t* const part = to + i / kPartWeights * kPartBytes;
            memcpy(part + kPartCodes + target % kPartWeights, (const char*)&sign_fraction + quarter * 8, 8);
            memcpy(codes + target, (const char*)&line_codes + quarter * 8, 8);
        }
    }
    for (int i = 0; i < kTileParts; i++)
        for (int j = 0; j < kPartCodes; j++) {
            const uint8_t* const of_part = codes + kPartWeights * i;
            to[kPartBytes * i + j] = (uint8_t)((of_part[j] & 15) | of_part[kPartCodes + j] << 4);
        }
    uint16_t any = 0;
    for (int i = 0; i < kTileInputs; i++) any |= outliers[i];
    return any;
}

// Packs blocks [first, last) of a matrix. Appends their outliers, and sets offsets[block] to how many there are before each;
// stops when there are more than `limit`.
inline void pack_bf16_blocks(
    const uint16_t* from, int first, int last, int inputs, int max_exponent, uint8_t* to, std::vector<Outlier>& outliers,
    int64_t* offsets, size_t limit
) {
    const size_t block_tiles = (size_t)inputs / kTileInputs;
    from += first * block_tiles * kTileWeights, to += first * block_tiles * kPackedTileBytes;
    for (int block = first; block < last && outliers.size() <= limit; block++) {
        offsets[block] = (int64_t)outliers.size();
        for (int index = 0; index < inputs * kVecSize; index += kTileWeights, from += kTileWeights, to += kPackedTileBytes) {
            if (!pack_tile(from, max_exponent, to)) continue;
            for (int i = 0; i < kTileWeights; i++) {
                const int exponent = from[i] >> kFractionBits & kExponentMask;
                if (exponent == 0 || (exponent <= max_exponent && exponent > max_exponent - kZeroCode)) continue;
                outliers.push_back({(uint32_t)(index + i), from[i]});
            }
        }
    }
}

// Packs a matrix, a range of blocks on each thread. Block n's outliers are outliers[offsets[n]] to outliers[offsets[n + 1] - 1].
// Returns their number, or -1 if there are more than `limit`.
inline int64_t pack_bf16(
    const uint16_t* from, int blocks, int inputs, int max_exponent, uint8_t* to, Outlier* outliers, int64_t* offsets,
    int64_t limit, int threads
) {
    std::vector<std::vector<Outlier>> found(threads);
    const auto first = [&](int thread) { return (int)((int64_t)blocks * thread / threads); };
    const auto pack = [&](int thread) {
        pack_bf16_blocks(
            from, first(thread), first(thread + 1), inputs, max_exponent, to, found[thread], offsets, (size_t)limit);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(pack, thread);
    pack(0);
    for (std::thread& other : others) other.join();
    int64_t count = 0;
    for (int thread = 0; thread < threads; thread++) {
        const int64_t more = (int64_t)found[thread].size();
        if (count + more > limit) return -1;
        for (int block = first(thread); block < first(thread + 1); block++) offsets[block] += count;
        std::copy(found[thread].begin(), found[thread].end(), outliers + count);
        count += more;
    }
    offsets[blocks] = count;
    return count;
}
