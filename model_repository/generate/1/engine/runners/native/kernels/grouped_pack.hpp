// Packs weights in groups into blocks of 16 outputs (grouped_form.hpp), while a model is loaded.
//
// Layout of the sources: codes [outputs][row_bytes], as gguf_codes.hpp unpacks their type; scales and minima
// [outputs][inputs / group], float16, or int8 in two levels, where pairs are scales; then factors of scales and of minima
// [outputs][ceil(inputs / 256)] in float16. Numbers may lie apart, as they do between the codes of a file's blocks.
// ISA variants: none; it is written in vectors of the compiler. Test: tests/inference/test_grouped.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include "gguf_codes.hpp"
#include "grouped_form.hpp"

// Numbers (outputs, groups): bytes from one output or group to the next.
struct GroupedNumbers {
    const uint8_t* data;
    int64_t output_bytes, group_bytes;

    const uint8_t* at(int output, int group) const { return data + output * output_bytes + group * group_bytes; }
};

struct GroupedSource {
    const uint8_t* codes;
    int64_t row_bytes;
    GroupedNumbers scales, minima, scale_factors, minimum_factors;
    int32_t outputs, inputs;
    GgufType type;
};

class GroupedPacker {
  public:
    GroupedPacker(const GroupedForm& form, const GroupedSource& source)
        : form_(form), source_(source), codes_(source.type) {}

    // `to` holds zeros.
    void pack_block(int block, uint8_t* to) const {
        const int first = block * kVecSize, count = std::min(kVecSize, source_.outputs - first);
        // All outputs of a record before the next one: each line is written once.
        for (int k = 0; k < source_.inputs; k += kRecordInputs) {
            uint8_t* const record = to + form_.record_offset(k);
            pack_scales(first, count, k, record);
            pack_codes(first, count, k, record + form_.codes_offset);
        }
        if (form_.two_level) pack_factors(first, count, to);
    }

  private:
    typedef uint32_t Quad __attribute__((vector_size(16)));

    void pack_scales(int first, int count, int k, uint8_t* record) const {
        const int number = k / form_.group, some = std::min(kRecordInputs, source_.inputs - k) / form_.group;
        for (int i = 0; i < some; i++) {
            pack_numbers(source_.scales, first, count, number + i, form_.two_level ? 1 : 2, record, i);
            if (form_.has_minima && !form_.pairs)
                pack_numbers(source_.minima, first, count, number + i, form_.two_level ? 1 : 2, record + form_.minima_offset, i);
        }
    }

    void pack_factors(int first, int count, uint8_t* to) const {
        for (int k = 0, number = 0; k < source_.inputs; k += kSuperInputs, number++) {
            uint8_t* const header = to + form_.record_offset(k) - kCacheLine;
            pack_numbers(source_.scale_factors, first, count, number, 2, header, 0);
            if (form_.has_minima) pack_numbers(source_.minimum_factors, first, count, number, 2, header, 1);
        }
    }

    // to[place][lane] = number `group` of each output.
    static void pack_numbers(const GroupedNumbers& from, int first, int count, int group, int bytes, uint8_t* to, int place) {
        uint8_t* const line = to + place * kVecSize * bytes;
        const auto copy = [&](auto size) __attribute__((always_inline)) {
            for (int lane = 0; lane < count; lane++) memcpy(line + lane * size, from.at(first + lane, group), size);
        };
        if (bytes == 1) copy(std::integral_constant<int, 1>());
        else copy(std::integral_constant<int, 2>());
    }

    // Of the outputs' inputs from k on, at most 64.
    void pack_codes(int first, int count, int k, uint8_t* to) const {
        const int inputs = std::min(kRecordInputs, source_.inputs - k), low = form_.bits / 4 * 4;
        alignas(kCacheLine) uint8_t codes[kVecSize][kRecordInputs] = {};
        for (int lane = 0; lane < count; lane++) codes_.unpack(source_.codes + (first + lane) * source_.row_bytes, k, inputs, codes[lane]);
        alignas(kCacheLine) uint8_t steps[kRecordInputs / kStepInputs][kStepBytes];
        transpose(codes, steps);
        constexpr int kSteps = kRecordInputs / kStepInputs;
        if (form_.bits == 8) return store_signed(steps, to);
        if (low)
            for (int step = 0; step < kSteps; step += 2, to += kStepBytes)
                for (int i = 0; i < kStepBytes; i++) to[i] = (steps[step][i] & 15) | steps[step + 1][i] << 4;
        const auto store_bits = [&](int bits, int from) {
            for (int step = 0; step < kSteps; step += 8 / bits, to += kStepBytes)
                for (int n = 0; n < 8 / bits; n++)
                    for (int i = 0; i < kStepBytes; i++) to[i] |= (steps[step + n][i] >> from & ((1 << bits) - 1)) << n * bits;
        };
        if (form_.bits % 4 >= 2) store_bits(2, low);
        if (form_.bits % 2) store_bits(1, form_.bits - 1);
    }

    void store_signed(const uint8_t (&steps)[kRecordInputs / kStepInputs][kStepBytes], uint8_t* to) const {
        for (const auto& step : steps)
            for (const uint8_t code : step) *to++ = code - form_.zero;
    }

    // to[step][4 lane + i] = from[lane][4 step + i]
    static void transpose(const uint8_t (&from)[kVecSize][kRecordInputs], uint8_t (&to)[kRecordInputs / kStepInputs][kStepBytes]) {
        constexpr int kQuad = 4;
        for (int lane = 0; lane < kVecSize; lane += kQuad)
            for (int step = 0; step < kRecordInputs / kStepInputs; step += kQuad) {
                Quad rows[kQuad];
                for (int i = 0; i < kQuad; i++) memcpy(&rows[i], from[lane + i] + step * kStepInputs, sizeof(Quad));
                const Quad low[] = {interleave_low(rows[0], rows[1]), interleave_low(rows[2], rows[3])};
                const Quad high[] = {interleave_high(rows[0], rows[1]), interleave_high(rows[2], rows[3])};
                const Quad columns[] = {first_halves(low), second_halves(low), first_halves(high), second_halves(high)};
                for (int i = 0; i < kQuad; i++) memcpy(to[step + i] + lane * kStepInputs, &columns[i], sizeof(Quad));
            }
    }

    static Quad interleave_low(Quad a, Quad b) { return __builtin_shuffle(a, b, Quad{0, 4, 1, 5}); }
    static Quad interleave_high(Quad a, Quad b) { return __builtin_shuffle(a, b, Quad{2, 6, 3, 7}); }
    static Quad first_halves(const Quad (&pair)[2]) { return __builtin_shuffle(pair[0], pair[1], Quad{0, 1, 4, 5}); }
    static Quad second_halves(const Quad (&pair)[2]) { return __builtin_shuffle(pair[0], pair[1], Quad{2, 3, 6, 7}); }

    const GroupedForm& form_;
    const GroupedSource& source_;
    const GgufCodes codes_;
};

inline void pack_grouped_blocks(const GroupedForm& form, const GroupedSource& source, int threads, uint8_t* to) {
    const int blocks = (source.outputs + kVecSize - 1) / kVecSize;
    const size_t block_bytes = grouped_block_bytes(form, source.inputs);
    const auto pack = [&](int thread) {
        const GroupedPacker packer(form, source);
        for (int block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++)
            packer.pack_block(block, to + block * block_bytes);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(pack, thread);
    pack(0);
    for (std::thread& other : others) other.join();
}
