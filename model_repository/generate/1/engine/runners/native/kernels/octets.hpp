// Rows times weights, both of eight bits. A row becomes whole numbers from -127 to 127 just before a product, with a
// scale for every 256 of them; an output's weights are such numbers already. Sums of their products are whole too, and
// so the same in every order and on every machine; scaled, they are added up in one order.
//
// Weights are packed as [outputs/16][inputs/4][16][4], the inputs padded with zeros to a multiple of 64: so the machine's
// instructions for them (AMX, AVX512-VNNI) read them.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "gemm.hpp"
#include "lanes.hpp"
#include "team.hpp"
#include "tiles.hpp"

// Inputs come in a tile's rows of so many, and so many of them share a scale.
constexpr int kStep = 64, kScaled = 256;
// At most so many rows go together; and so many parts of two blocks of weights stay in the first cache while rows pass.
constexpr int kMostOctets = 512, kNearParts = 3;

inline int in_steps(int inputs) { return (inputs + kStep - 1) / kStep * kStep; }
inline int scaled_parts(int inputs) { return (inputs + kScaled - 1) / kScaled; }

// The rows of one product, all with equally many inputs.
class Octets {
  public:
    void reserve(size_t rows, int inputs) {
        numbers_.resize(std::max(numbers_.size(), rows * in_steps(inputs)));
        scales_.resize(std::max(scales_.size(), rows * scaled_parts(inputs)));
        sums_.resize(scales_.size());
    }

    template <typename T>
    void round(const T* from, int row, int inputs) {
        const int parts = scaled_parts(inputs);
        int8_t* to = &numbers_[(size_t)row * in_steps(inputs)];
        for (int part = 0; part < parts; part++) {
            const int first = part * kScaled, count = std::min(kScaled, inputs - first);
            round_part(from + first, count, to + first, (size_t)row * parts + part);
        }
        std::fill(to + inputs, to + in_steps(inputs), 0);
    }

    const int8_t* row(int row, int inputs) const { return &numbers_[(size_t)row * in_steps(inputs)]; }
    float scale(int row, int inputs, int part) const { return scales_[(size_t)row * scaled_parts(inputs) + part]; }
    int32_t sum(int row, int inputs, int part) const { return sums_[(size_t)row * scaled_parts(inputs) + part]; }

  private:
    template <typename T>
    void round_part(const T* from, int count, int8_t* to, size_t part) {
        Lanes most = {};
        Ints strange = {}, total = {};
        for (int k = 0; k < count; k += kLanes) {
            const Lanes found = load(from + k), size = found < 0.0f ? -found : found;
            most = size > most ? size : most;
            strange |= found != found;
        }
        const float largest_size = largest(most), steps = largest_size > 0.0f ? 127.0f / largest_size : 0.0f;
        for (int k = 0; k < count; k += kLanes) {
            // Adding this leaves the nearest whole number in the lowest bits.
            const Ints whole = (Ints)(load(from + k) * steps + 12582912.0f) - 0x4b400000;
            const Bytes bytes = __builtin_convertvector(whole, Bytes);
            memcpy(to + k, &bytes, sizeof bytes);
            total += whole;
        }
        int32_t sum = 0, no_numbers = 0;
        for (int lane = 0; lane < kLanes; lane++) sum += total[lane], no_numbers |= strange[lane];
        scales_[part] = no_numbers ? __builtin_nanf("") : largest_size / 127.0f;
        sums_[part] = sum;
    }

    Numbers<int8_t> numbers_;
    Numbers<float> scales_;
    // Of a part's numbers.
    Numbers<int32_t> sums_;
};

// What four inputs of one row add to sixteen outputs.
#ifdef __AVX512VNNI__
struct OctetSum {
    // The instruction takes weights without a sign: they are so much larger here.
    static constexpr int kLarger = 128;
    __m512i weights;
    explicit OctetSum(const int8_t* from) : weights(_mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128))) {}
    void add(SixteenInts& total, const int8_t* row) const {
        int32_t four;
        memcpy(&four, row, sizeof four);
        total = (Ints)_mm512_dpbusd_epi32((__m512i)total, weights, _mm512_set1_epi32(four));
    }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct OctetSum {
    static constexpr int kLarger = 0;
    // The instruction takes one side without a sign: the weights' sizes; the row's numbers take on the weights' signs.
    // Two products of at most 127 times 127 find room in sixteen bits.
    __m256i weights[2], sizes[2];
    explicit OctetSum(const int8_t* from) {
        for (int i = 0; i < 2; i++) {
            weights[i] = _mm256_loadu_si256((const __m256i*)from + i);
            sizes[i] = _mm256_abs_epi8(weights[i]);
        }
    }
    void add(SixteenInts& total, const int8_t* row) const {
        int32_t four;
        memcpy(&four, row, sizeof four);
        const __m256i numbers = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
        for (int i = 0; i < 2; i++) {
            const __m256i pairs = _mm256_maddubs_epi16(sizes[i], _mm256_sign_epi8(numbers, weights[i]));
            total.parts[i] += (IntsPart)_mm256_madd_epi16(pairs, ones);
        }
    }
};
#else
struct OctetSum {
    static constexpr int kLarger = 0;
    Ints weights[4];
    explicit OctetSum(const int8_t* from) {
        Ints four;
        memcpy(&four, from, sizeof four);
        for (int i = 0; i < 4; i++) weights[i] = (four << (24 - 8 * i)) >> 24;
    }
    void add(SixteenInts& total, const int8_t* row) const {
        Ints sum = total;
        for (int i = 0; i < 4; i++) sum += weights[i] * row[i];
        memcpy(&total, &sum, sizeof total);
    }
};
#endif

// The sums of so many rows for the blocks from `first` on.
template <int kRows, int kBlocks, int kAll>
void octet_sums(const Octets& rows, const int8_t* weights, int inputs, int m, int first, Lanes (*totals)[kAll]) {
    const int stride = in_steps(inputs);
    for (int part = 0; part < scaled_parts(inputs); part++) {
        SixteenInts found[kRows][kBlocks] = {};
        for (int k = part * kScaled; k < std::min((part + 1) * kScaled, stride); k += 4)
#pragma GCC unroll 2
            for (int n = 0; n < kBlocks; n++) {
                const OctetSum step(weights + ((size_t)(first + n) * stride + k) * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; i++) step.add(found[i][n], rows.row(m + i, inputs) + k);
            }
        for (int i = 0; i < kRows; i++)
            for (int n = 0; n < kBlocks; n++) {
                const Ints exact = (Ints)found[i][n] - OctetSum::kLarger * rows.sum(m + i, inputs, part);
                totals[i][first + n] += rows.scale(m + i, inputs, part) * __builtin_convertvector(exact, Lanes);
            }
    }
}

template <int kRows, int kBlocks, typename Done>
void octet_rows(const Octets& rows, const int8_t* weights, int inputs, int m, Claim& claim, Done done) {
    Lanes totals[kRows][kBlocks] = {};
    constexpr int kTogether = kRows * kBlocks > kSumsInRegisters ? 1 : kBlocks;
    for (int n = 0; n < kBlocks; n += kTogether) octet_sums<kRows, kTogether>(rows, weights, inputs, m, n, totals);
    if (!claim.mine()) return;
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) done(m + i, n, totals[i][n]);
}

template <int kBlocks, typename Done>
void octet_columns(const Octets& rows, int first, int count, const int8_t* weights, int inputs, Claim& claim, Done done) {
    int m = first;
    const int end = first + count;
    for (; m + kRowsTogether <= end; m += kRowsTogether)
        octet_rows<kRowsTogether, kBlocks>(rows, weights, inputs, m, claim, done);
    if (end - m >= 4) octet_rows<4, kBlocks>(rows, weights, inputs, m, claim, done), m += 4;
    if (end - m >= 2) octet_rows<2, kBlocks>(rows, weights, inputs, m, claim, done), m += 2;
    if (end - m >= 1) octet_rows<1, kBlocks>(rows, weights, inputs, m, claim, done);
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// What one part's inputs of sixteen rows add to two blocks of outputs, or one, in whole numbers.
template <bool kPair>
void octets_in_tiles(const int8_t* rows, int stride, const int8_t* weights, int from, int to, int32_t (*exact)[kTileRows][kLanes]) {
    clear_sums();
    for (int k = from; k < to; k += kStep) {
        _tile_loadd(2, rows + k, stride);
        _tile_loadd(3, weights + (size_t)k * kLanes, 64);
        _tile_dpbssd(0, 2, 3);
        if (!kPair) continue;
        _tile_loadd(3, weights + (size_t)(stride + k) * kLanes, 64);
        _tile_dpbssd(1, 2, 3);
    }
    store_sums<kPair>(exact);
}

// Two blocks of outputs, or one, for all rows: some of the inputs for all of them, and then the next ones.
template <bool kPair, typename Done>
__attribute__((noinline)) void amx_octets(
    const Octets& rows, int first, int count, const int8_t* weights, int inputs, Claim& claim, Done done
) {
    const int stride = in_steps(inputs), parts = scaled_parts(inputs);
    alignas(64) int32_t exact[2][kTileRows][kLanes];
    alignas(64) float totals[kMostOctets][2][kLanes];
    before_tiles();
    for (int near = 0; near < parts; near += kNearParts) {
        const int end = std::min(near + kNearParts, parts);
        for (int m = 0; m < count; m += kTileRows) {
            const int some = std::min(kTileRows, count - m);
            for (int part = near; part < end; part++) {
                const int from = part * kScaled, to = std::min(from + kScaled, stride);
                octets_in_tiles<kPair>(rows.row(first + m, inputs), stride, weights, from, to, exact);
                for (int i = 0; i < some; i++)
                    for (int n = 0; n <= kPair; n++) {
                        Ints whole;
                        memcpy(&whole, exact[n][i], sizeof whole);
                        const Lanes before = part ? load(totals[m + i][n]) : Lanes{};
                        const float scale = rows.scale(first + m + i, inputs, part);
                        store(totals[m + i][n], before + scale * __builtin_convertvector(whole, Lanes));
                    }
            }
            if (end < parts || !claim.mine()) continue;
            for (int i = 0; i < some; i++)
                for (int n = 0; n <= kPair; n++) done(first + m + i, n, load(totals[m + i][n]));
        }
    }
}
#endif

template <bool kPair, typename Done>
void octet_product(const Octets& rows, int first, int count, const int8_t* weights, int inputs, Claim& claim, Done done) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    if (tiles_are_ours()) return amx_octets<kPair>(rows, first, count, weights, inputs, claim, done);
#endif
    octet_columns<1 + kPair>(rows, first, count, weights, inputs, claim, done);
}

// What is left of the outputs, for all rows: `done(row, block, sixteen numbers)` takes them.
template <typename Done>
void multiply(
    const Octets& rows, int count, const int8_t* weights, const float* scales, int inputs, int outputs, Share& share, Done done
) {
    const int last = outputs / kLanes, most = rows_together<int8_t>(inputs, kMostOctets);
    const size_t block = (size_t)in_steps(inputs) * kLanes;
    each_pair(count, most, last, share, [&](int first, int some, int at, bool pair, Claim& claim) {
        const auto take = [&](int row, int n, Lanes found) { done(row, at + n, found * load(scales + (at + n) * kLanes)); };
        if (pair) octet_product<true>(rows, first, some, weights + at * block, inputs, claim, take);
        else octet_product<false>(rows, first, some, weights + at * block, inputs, claim, take);
    });
}
