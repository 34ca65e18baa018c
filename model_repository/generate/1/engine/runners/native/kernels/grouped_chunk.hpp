// A chunk of inputs of a block of weights in groups, unpacked into the first-level cache, and its sums with many rows.
//
// Layout: bytes [inputs / 4][16][4], and the groups' scales. The order of a row's sums is that of grouped_sums.hpp.
// ISA variants: __AMX_INT8__ (and amx_available() at run time) multiplies tiles; otherwise those of byte_dot.hpp. Test:
// tests/inference/test_grouped.py.
#pragma once

#include <cstddef>
#include <type_traits>

#include "amx.hpp"
#include "grouped_sums.hpp"

// A chunk of inputs of a block, unpacked.
struct GroupedChunk {
    alignas(kCacheLine) uint8_t bytes[kSuperInputs * kVecSize];
    alignas(kCacheLine) GroupScales scales;

    void unpack(const GroupedBlock& block, int begin, int count) {
        const GroupedForm& form = *block.form;
        load_scales(form, block.data, begin, count, offset(form), scales);
        with_codes(form, [&](auto codes) { unpack<decltype(codes)::value>(form, block.data, begin, count); });
    }

  private:
    template <Codes kCodes>
    void unpack(const GroupedForm& form, const uint8_t* block, int begin, int count) {
        typedef ByteDot<is_wide(kCodes)> Dot;
        const int steps_per_group = form.group / 8;
        Reg16i sum = {};
        for (int k = 0, step = 0, group = 0; k < count; k += kRecordInputs) {
            const uint8_t* from = block + form.record_offset(begin + k) + form.codes_offset;
            for (int j = 0; j < kRecordInputs / 8; j++) {
                CodeBytes first, second;
                unpack_codes<kCodes>(form, from, j, first, second);
                first.store(bytes + (k + 8 * j) * kVecSize);
                second.store(bytes + (k + 8 * j + kStepInputs) * kVecSize);
                Dot(first).add(sum, four_ones());
                Dot(second).add(sum, four_ones());
                if (++step < steps_per_group) continue;
                store(scales.code_sum[group], scaled_sum(load_regs(scales.scale[group]), sum));
                sum = Reg16i{};
                step = 0, group++;
            }
        }
    }

    static float offset(const GroupedForm& form) { return offset_of(codes_of(form)); }
};

// Adds a chunk for the rows of a pass.
template <bool kWide, int kGroup, int kRows, int kBlocks>
__attribute__((noinline)) void grouped_accumulate(
    Int8Group group, size_t next_group, const GroupedChunk* chunks, int count, bool first, RowSums* sums, int to_block
) {
    GroupedSums<kRows, kBlocks> all;
    const GroupScales* scales[kBlocks];
    for (int n = 0; n < kBlocks; n++) scales[n] = &chunks[n].scales;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) all.totals[i][n] = first ? Reg16{} : load_regs(sums[i][to_block + n]);
    all.clear();
    for (int k = 0; k < count; k += kGroup) {
#pragma GCC unroll 8
        for (int step = 0; step < kGroup; step += kStepInputs)
#pragma GCC unroll 2
            for (int n = 0; n < kBlocks; n++) {
                const ByteDot<kWide> dot(CodeBytes::load(chunks[n].bytes + (k + step) * kVecSize));
                all.add(n, dot, group, k % kRowGroup + step);
            }
        const bool second = kGroup == 16 && k % kRowGroup;
        const Int8Group::Field field = kGroup == kRowGroup ? Int8Group::kSum : second ? Int8Group::kSecondSum : Int8Group::kFirstSum;
        Reg16 code_sums[kBlocks];
        for (int n = 0; n < kBlocks; n++) code_sums[n] = load_regs(scales[n]->code_sum[k / kGroup]);
        all.end_group(scales, code_sums, k / kGroup, group, field);
        if (kGroup == kRowGroup || second) group.from += next_group;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) store(sums[i][to_block + n], all.totals[i][n]);
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// Tile 2 holds a group's inputs of 16 rows, tile 3 its codes of 16 outputs.
inline void begin_grouped_tiles(int group) {
    TileConfig config;
    config.bytes[2] = group;
    config.rows[3] = group / kStepInputs;
    configure_tiles(config);
}

// The exact sums of two groups of 16 rows.
typedef int32_t TileSums[2][kTileRows][kVecSize];

// Adds a chunk for 16 rows. Two groups at a time: one is multiplied while the other is stored.
template <int kGroup>
__attribute__((noinline)) void grouped_amx(
    Int8Group rows, size_t next_group, const GroupedChunk& chunk, int count, bool first, RowSums* sums, int block
) {
    alignas(kCacheLine) TileSums exact;
    constexpr int kSumBytes = sizeof exact[0][0];
    // Tile numbers are literals: GCC writes them into the instruction as they are.
    const auto load_tiles = [&](const Int8Group& group, int k) {
        _tile_loadd(2, group.row(0) + k % kRowGroup, Int8Group::kRowBytes);
        _tile_loadd(3, chunk.bytes + k * kVecSize, kStepBytes);
    };
    for (int k = 0; k < count; k += 2 * kGroup) {
        const Int8Group second_rows = {rows.from + (kGroup == kRowGroup ? next_group : 0)};
        compiler_fence();
        _tile_zero(0);
        load_tiles(rows, k);
        _tile_dpbsud(0, 2, 3);
        _tile_stored(0, exact[0], kSumBytes);
        _tile_zero(1);
        load_tiles(second_rows, k + kGroup);
        _tile_dpbsud(1, 2, 3);
        _tile_stored(1, exact[1], kSumBytes);
        compiler_fence();
        const int number = k / kGroup;
        const bool whole = kGroup == kRowGroup;
        for (int i = 0; i < kTileRows; i++) {
            Vec16 total = k || !first ? load(sums[i][block]) : Vec16{};
            const auto add = [&](int n, const Int8Group& group, Int8Group::Field sum) {
                const GroupScales& scales = chunk.scales;
                const Vec16i exact_sums = *reinterpret_cast<const Vec16i*>(exact[n][i]);
                add_product(total, group.field(Int8Group::kMiddle, i), load(scales.code_sum[number + n]));
                add_product(total, group.field(sum, i), load(scales.minimum[number + n]));
                add_product(total, group.field(Int8Group::kScale, i) * load(scales.scale[number + n]), to_floats(exact_sums));
            };
            add(0, rows, whole ? Int8Group::kSum : Int8Group::kFirstSum);
            add(1, second_rows, whole ? Int8Group::kSum : Int8Group::kSecondSum);
            store(sums[i][block], total);
        }
        rows.from += whole ? 2 * next_group : next_group;
    }
}
#endif
