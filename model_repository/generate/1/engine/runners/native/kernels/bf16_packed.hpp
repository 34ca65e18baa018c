// Lossless 12-bit bfloat16: a weight's lower byte, the last bit of its exponent and the fraction, and a code of 4 bits for its
// upper byte: the sign, and one of eight pairs of exponents. A matrix's exponents lie close together: eight pairs cover all
// weights but one to three in ten thousand. The others, outliers, are listed with their index.
// A small batch waits for weights to be read from memory; 12 bits are a quarter less to read than 16.
//
// Layout: tiles of [32 inputs / 2][16 outputs][2] weights in gemm.hpp's order, 768 bytes for 512 weights, of which each 128 are 192
// bytes:
//   bytes [0, 64)    codes, two in a byte: byte j holds the code of byte 64 + j in its low half, and that of byte 128 + j in its
//                    high half
//   bytes [64, 192)  the lower byte of each weight
// Within 64 weights, byte 16 q + 8 h + b holds weight 32 h + 8 q + b, so that unpacklo and unpackhi of (low bytes, high
// bytes) give weights in order. Bytes are read one after the other, as the processor's own prefetching expects.
// upper byte(code) = (code / 8) << 7 | pair(code % 8), pair(i) = highest - i; pair(7) = 0 where that covers more weights.
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
constexpr uint16_t kCodes = 16, kPairCodes = 8, kPairMask = kPairCodes - 1;

// A weight whose exponent has no code: its index in its block of outputs, and its bits.
struct Outlier {
    uint32_t index;
    uint16_t bits;
};

// bfloat16: 1 bit of sign, 8 of exponent, of which 7 are in the upper byte and name a pair, and 7 of fraction.
inline int pair_of(uint16_t bits) { return bits >> 8 & 127; }

// The pairs of exponents that have codes: highest, highest - 1, …, and for has_zero, in place of the eighth, that of zeros.
struct ExponentPairs {
    // As one number: the highest pair, and a flag.
    static constexpr int kZeroFlag = 128;
    int highest;
    bool has_zero;

    explicit ExponentPairs(int number) : highest(number & 127), has_zero(number & kZeroFlag) {}
    int in_sequence() const { return kPairCodes - has_zero; }
    int pair(int code) const { return code < in_sequence() ? highest - code : 0; }
    bool has_code(uint16_t bits) const {
        const int pair = pair_of(bits);
        return (has_zero && pair == 0) || (pair <= highest && pair > highest - in_sequence());
    }
};

// code -> a weight's upper byte.
struct UpperBytes {
    alignas(16) uint8_t of_code[kCodes];
    explicit UpperBytes(int pairs) {
        for (int code = 0; code < kCodes; code++)
            of_code[code] = (uint8_t)(code / kPairCodes << 7 | ExponentPairs(pairs).pair(code % kPairCodes));
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

// By registers: GCC copies a line as a whole through the stack.
inline void store_line(bf16* to, const Line& line) {
#ifdef __AVX512F__
    memcpy(to, &line, sizeof line);
#else
    for (int i = 0; i < kRegsPerVec; i++) memcpy(to + 2 * i * kRegSize, &line.regs[i], sizeof line.regs[i]);
#endif
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
    __m512i upper_bytes;

    explicit LineUnpacker(const UpperBytes& table)
        : upper_bytes(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table.of_code))) {}

    void unpack(const uint8_t* part, int half, Line& first, Line& second) const {
        const __m512i two_codes = _mm512_loadu_si512(part);
        const __m512i codes = _mm512_and_si512(half ? _mm512_srli_epi16(two_codes, 4) : two_codes, _mm512_set1_epi8(15));
        const __m512i high = _mm512_shuffle_epi8(upper_bytes, codes);
        const __m512i low = _mm512_loadu_si512(part + kPartCodes + half * 64);
        first = (Line)_mm512_unpacklo_epi8(low, high);
        second = (Line)_mm512_unpackhi_epi8(low, high);
    }
};
#else
struct LineUnpacker {
    __m256i upper_bytes;

    explicit LineUnpacker(const UpperBytes& table)
        : upper_bytes(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.of_code))) {}

    void unpack(const uint8_t* part, int half, Line& first, Line& second) const {
#pragma GCC unroll 2
        for (int n = 0; n < kRegsPerVec; n++) {
            const __m256i two_codes = _mm256_loadu_si256((const __m256i*)(part + n * 32));
            const __m256i codes = _mm256_and_si256(half ? _mm256_srli_epi16(two_codes, 4) : two_codes, _mm256_set1_epi8(15));
            const __m256i high = _mm256_shuffle_epi8(upper_bytes, codes);
            const __m256i low = _mm256_loadu_si256((const __m256i*)(part + kPartCodes + half * 64 + n * 32));
            first.regs[n] = (RegUint)_mm256_unpacklo_epi8(low, high);
            second.regs[n] = (RegUint)_mm256_unpackhi_epi8(low, high);
        }
    }
};
#endif

template <bool kPrefetches>
void unpack_tile(const uint8_t* from, const UpperBytes& table, bf16* to) {
    const LineUnpacker unpacker(table);
    if (kPrefetches) prefetch<kPackedTileBytes, 1>(from + kPrefetchAhead);
    for (int i = 0; i < kTileParts; i++)
        for (int half = 0; half < 2; half++) {
            Line first, second;
            bf16* target = to + (4 * i + 2 * half) * kLineWeights;
            unpacker.unpack(from + i * kPartBytes, half, first, second);
            store_line(target, first);
            store_line(target + kLineWeights, second);
        }
}
#else
constexpr bool kCanUnpack = false;
template <bool>
void unpack_tile(const uint8_t*, const UpperBytes&, bf16*) {}
#endif

// The pairs that cover the most weights of a sample. Any choice is lossless.
inline int choose_exponent_pairs(const uint16_t* from, size_t count) {
    constexpr int kSampled = 1 << 16, kPairs = 128;
    size_t histogram[kPairs] = {}, most = 0;
    // An odd step reaches all outputs: weights of one output are a power of two apart.
    for (size_t i = 0, step = count / kSampled | 1; i < count; i += step) histogram[pair_of(from[i])]++;
    int best = kPairCodes - 1;
    for (int highest = kPairCodes - 1; highest < kPairs; highest++)
        for (const int number : {highest, highest | ExponentPairs::kZeroFlag}) {
            const ExponentPairs pairs(number);
            size_t covered = 0;
            for (int code = 0; code < kPairCodes; code++) covered += histogram[pairs.pair(code)];
            if (covered > most) most = covered, best = number;
        }
    return best;
}

// Packs a tile. Returns whether it has outliers.
inline bool pack_tile(const uint16_t* from, ExponentPairs pairs, uint8_t* to) {
    typedef uint16_t Line __attribute__((vector_size(2 * kTileInputs)));
    typedef uint8_t LineBytes __attribute__((vector_size(kTileInputs)));
    const uint16_t highest = (uint16_t)pairs.highest, in_sequence = (uint16_t)pairs.in_sequence();
    // No pair without zeros.
    const uint16_t zero = pairs.has_zero ? 0 : 0xffff;
    uint8_t codes[kTileWeights];
    Line outliers = {};
    for (int i = 0; i < kTileWeights; i += kTileInputs) {
        Line line;
        memcpy(&line, from + i, sizeof line);
        const Line pair = line >> 8 & 127, below = highest - pair, is_zero = (Line)(pair == zero);
        const Line code = ((is_zero | below) & kPairMask) | (line >> 15) * kPairCodes;
        outliers |= ~is_zero & (Line)(below >= in_sequence);
        const LineBytes lower_bytes = __builtin_convertvector(line & 255, LineBytes);
        const LineBytes line_codes = __builtin_convertvector(code, LineBytes);
        for (int quarter = 0; quarter < 4; quarter++) {
            const int target = i / 64 * 64 + quarter * 16 + i / 32 % 2 * 8;
            uint8_t* const part = to + i / kPartWeights * kPartBytes;
            memcpy(part + kPartCodes + target % kPartWeights, (const char*)&lower_bytes + quarter * 8, 8);
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
    const uint16_t* from, int first, int last, int inputs, ExponentPairs pairs, uint8_t* to, std::vector<Outlier>& outliers,
    int64_t* offsets, size_t limit
) {
    const size_t block_tiles = (size_t)inputs / kTileInputs;
    from += first * block_tiles * kTileWeights, to += first * block_tiles * kPackedTileBytes;
    for (int block = first; block < last && outliers.size() <= limit; block++) {
        offsets[block] = (int64_t)outliers.size();
        for (int index = 0; index < inputs * kVecSize; index += kTileWeights, from += kTileWeights, to += kPackedTileBytes) {
            if (!pack_tile(from, pairs, to)) continue;
            for (int i = 0; i < kTileWeights; i++)
                if (!pairs.has_code(from[i])) outliers.push_back({(uint32_t)(index + i), from[i]});
        }
    }
}

// Packs a matrix, a range of blocks on each thread. Block n's outliers are outliers[offsets[n]] to outliers[offsets[n + 1] - 1].
// Returns their number, or -1 if there are more than `limit`.
inline int64_t pack_bf16(
    const uint16_t* from, int blocks, int inputs, ExponentPairs pairs, uint8_t* to, Outlier* outliers, int64_t* offsets,
    int64_t limit, int threads
) {
    std::vector<std::vector<Outlier>> found(threads);
    const auto first = [&](int thread) { return (int)((int64_t)blocks * thread / threads); };
    const auto pack = [&](int thread) {
        pack_bf16_blocks(
            from, first(thread), first(thread + 1), inputs, pairs, to, found[thread], offsets, (size_t)limit);
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
