// Packs weights in groups into blocks of 16 outputs (grouped_form.hpp), while a model is loaded.
//
// Layout of the sources, row by row: codes [outputs][row_bytes], as gguf_codes.hpp unpacks their type; scales and minima
// [outputs][inputs / group], float16, or int8 in two levels, where pairs are scales; then factors of scales and of minima [outputs][ceil(inputs / 256)] in
// float16.
// ISA variants: none. Test: tests/inference/test_grouped.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "gguf_codes.hpp"
#include "grouped_form.hpp"

struct GroupedSource {
    const uint8_t* codes;
    const void *scales, *minima;
    const uint16_t *scale_factors, *minimum_factors;
    int64_t row_bytes;
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
        for (int lane = 0; lane < count; lane++) {
            pack_scales(first + lane, lane, to);
            for (int k = 0; k < source_.inputs; k += kRecordInputs)
                pack_codes(first + lane, lane, k, to + form_.record_offset(k) + form_.codes_offset);
        }
    }

  private:
    void pack_scales(int output, int lane, uint8_t* to) const {
        const int groups = source_.inputs / form_.group, per_record = kRecordInputs / form_.group;
        const int size = form_.two_level ? 1 : 2, supers = (source_.inputs + kSuperInputs - 1) / kSuperInputs;
        for (int group = 0; group < groups; group++) {
            uint8_t* record = to + form_.record_offset(group / per_record * kRecordInputs);
            const size_t from = ((size_t)output * groups + group) * size, place = (group % per_record * kVecSize + lane) * size;
            memcpy(record + place, static_cast<const uint8_t*>(source_.scales) + from, size);
            if (form_.has_minima && !form_.pairs)
                memcpy(record + form_.minima_offset + place, static_cast<const uint8_t*>(source_.minima) + from, size);
        }
        for (int i = 0; form_.two_level && i < supers; i++) {
            uint8_t* header = to + form_.record_offset(i * kSuperInputs) - kCacheLine;
            memcpy(header + 2 * lane, source_.scale_factors + (size_t)output * supers + i, 2);
            if (form_.has_minima)
                memcpy(header + kCacheLine / 2 + 2 * lane, source_.minimum_factors + (size_t)output * supers + i, 2);
        }
    }

    // Of an output's inputs from k on, at most 64; four at a time.
    void pack_codes(int output, int lane, int k, uint8_t* to) const {
        const int count = std::min(kRecordInputs, source_.inputs - k), planes = form_.bits == 8 ? 0 : form_.bits % 4;
        uint8_t codes[kRecordInputs];
        codes_.unpack(source_.codes + output * source_.row_bytes, k, count, codes);
        uint8_t* const masks = to + (form_.bits >= 4 ? kRecordInputs / 8 * kStepBytes : 0);
        for (int step = 0; step < count / kStepInputs; step++) {
            uint32_t four, nibbles;
            memcpy(&four, codes + step * kStepInputs, sizeof four);
            if (form_.bits == 8) memcpy(to + step * kStepBytes + lane * kStepInputs, &four, sizeof four);
            else if (form_.bits >= 4) {
                uint8_t* const place = to + step / 2 * kStepBytes + lane * kStepInputs;
                memcpy(&nibbles, place, sizeof nibbles);
                nibbles |= (four & 0x0f0f0f0f) << step % 2 * 4;
                memcpy(place, &nibbles, sizeof nibbles);
            }
            for (int plane = 0; plane < planes; plane++) {
                uint8_t* const mask = masks + (plane * (kRecordInputs / kStepInputs) + step) * sizeof(uint64_t) + lane / 2;
                *mask |= bits_of_four(four >> (form_.bits / 4 * 4 + plane)) << lane % 2 * 4;
            }
        }
    }

    // Bit i of the result is the lowest bit of byte i.
    static uint32_t bits_of_four(uint32_t bytes) { return (bytes & 0x01010101) * 0x01020408 >> 24 & 15; }

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
