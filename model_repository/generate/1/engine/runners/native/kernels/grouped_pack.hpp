// Packs weights in groups into blocks of 16 outputs (grouped_form.hpp), while a model is loaded.
//
// Layout of the sources, row by row: codes [outputs][inputs], a byte each, from 0 on; scales and minima [outputs][inputs / group],
// float16, or int8 in two levels; then factors of scales and of minima [outputs][ceil(inputs / 256)] in float16.
// ISA variants: none. Test: tests/inference/test_grouped.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "grouped_form.hpp"

struct GroupedSource {
    const uint8_t* codes;
    const void *scales, *minima;
    const uint16_t *scale_factors, *minimum_factors;
    int32_t outputs, inputs;
};

class GroupedPacker {
  public:
    GroupedPacker(const GroupedForm& form, const GroupedSource& source) : form_(form), source_(source) {}

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
            if (form_.has_minima)
                memcpy(record + form_.minima_offset + place, static_cast<const uint8_t*>(source_.minima) + from, size);
        }
        for (int i = 0; form_.two_level && i < supers; i++) {
            uint8_t* header = to + form_.record_offset(i * kSuperInputs) - kCacheLine;
            memcpy(header + 2 * lane, source_.scale_factors + (size_t)output * supers + i, 2);
            if (form_.has_minima)
                memcpy(header + kCacheLine / 2 + 2 * lane, source_.minimum_factors + (size_t)output * supers + i, 2);
        }
    }

    // Of an output's inputs from k on, at most 64.
    void pack_codes(int output, int lane, int k, uint8_t* to) const {
        const uint8_t* codes = source_.codes + (size_t)output * source_.inputs + k;
        const int count = std::min(kRecordInputs, source_.inputs - k), planes = form_.bits == 8 ? 0 : form_.bits % 4;
        for (int step = 0; step < count / kStepInputs; step++)
            for (int i = 0; i < kStepInputs; i++) {
                const uint8_t code = codes[step * kStepInputs + i];
                const int place = lane * kStepInputs + i;
                if (form_.bits == 8) to[step * kStepBytes + place] = code;
                else if (form_.bits >= 4) to[step / 2 * kStepBytes + place] |= (code & 15) << step % 2 * 4;
                uint8_t* masks = to + (form_.bits >= 4 ? kRecordInputs / 8 * kStepBytes : 0);
                for (int plane = 0; plane < planes; plane++, masks += kRecordInputs / kStepInputs * sizeof(uint64_t)) {
                    const int bit = code >> (form_.bits / 4 * 4 + plane) & 1;
                    masks[step * sizeof(uint64_t) + place / 8] |= bit << place % 8;
                }
            }
    }

    const GroupedForm& form_;
    const GroupedSource& source_;
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
