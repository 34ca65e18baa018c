// A chunk of inputs of a block of weights in groups, unpacked into the first-level cache, and its sums with many rows.
//
// Layout: codes in signed bytes [inputs / 4][16][4], and the groups' scales. The order of a row's sums is that of grouped_sums.hpp.
// ISA variants: __AMX_INT8__ (and amx_available() at run time) multiplies tiles; otherwise those of byte_dot.hpp. Test:
// tests/inference/test_grouped.py.
#pragma once

#include <cstddef>

#include "amx.hpp"
#include "grouped_sums.hpp"

// A chunk of inputs of a block, unpacked.
struct GroupedChunk {
    alignas(kCacheLine) uint8_t bytes[kSuperInputs * kVecSize];
    alignas(kCacheLine) GroupScales scales;

    void unpack(const GroupedBlock& block, int begin, int count) {
        const GroupedForm& form = *block.form;
        load_scales(form, block.data, begin, count, scales);
        with_codes(form, [&](auto codes) { unpack<decltype(codes)::value>(form, block.data, begin, count); });
    }

  private:
    template <Codes kCodes>
    void unpack(const GroupedForm& form, const uint8_t* block, int begin, int count) {
        with_group(form, [&](auto group) { unpack<kCodes, decltype(group)::value>(form, block, begin, count); });
    }

    template <Codes kCodes, int kGroup>
    void unpack(const GroupedForm& form, const uint8_t* block, int begin, int count) {
        typedef ByteDot<largest_of(kCodes)> Dot;
        for (int k = 0; k < count; k += kRowGroup) {
            const uint8_t* from = block + form.record_offset(begin + k / kRecordInputs * kRecordInputs) + form.codes_offset;
            Reg16 weight_sum = {};
            typename Dot::CodeSum sum;
#pragma GCC unroll 4
            for (int j = 0; j < kRowGroup / 8; j++) {
                CodeBytes first, second;
                unpack_codes<kCodes>(form, from, (unsigned)k % kRecordInputs / kRowGroup, j, first, second);
                first.store(bytes + (k + 8 * j) * kVecSize);
                second.store(bytes + (k + 8 * j + kStepInputs) * kVecSize);
                const int step = j * 8 % kGroup / kStepInputs;
                sum.add_step(Dot(first), step);
                sum.add_step(Dot(second), step + 1);
                if ((j + 1) * 8 % kGroup == 0) add_weights(weight_sum, form, scales, (k + 8 * j) / kGroup, to_floats(sum.total));
            }
            store(scales.weight_sum[k / kRowGroup], weight_sum);
        }
    }
};

// Adds a chunk for the rows of a pass.
template <int kLargest, int kGroup, int kRows>
__attribute__((noinline)) void grouped_accumulate(
    const GroupedForm& form, const ByteGroups& rows, const GroupedChunk& chunk, bool first, RowSums* sums, int block
) {
    typedef GroupedSums<kLargest, kGroup, kRows, 1> Sums;
    Sums all;
    alignas(kCacheLine) typename Sums::Totals totals;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(totals[i][0], first ? Reg16{} : load_regs(sums[i][block]));
    all.clear();
    rows.for_each([&](int first_input, const ByteGroup& group) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int part = 0; part < kRowGroup / kGroup; part++) {
            const int k = first_input + part * kGroup;
#pragma GCC unroll 8
            for (int step = 0; step < kGroup; step += kStepInputs) {
                const ByteDot<kLargest> dot(CodeBytes::load(chunk.bytes + (k + step) * kVecSize));
                all.add(0, dot, group, part * kGroup + step);
            }
            all.end_weights(0, form, chunk.scales, k / kGroup, group, part);
        }
        all.end_rows(0, group, load_regs(chunk.scales.weight_sum[first_input / kRowGroup]), totals);
    });
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(sums[i][block], load_regs(totals[i][0]));
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// Tile 2 holds a group's inputs of some rows, tile 3 its codes of 16 outputs; tiles 0 and 1 their exact sums.
inline void begin_grouped_tiles(int group, int rows) {
    TileConfig config;
    for (int tile = 0; tile < 3; tile++) config.rows[tile] = rows;
    config.bytes[2] = group;
    config.rows[3] = group / kStepInputs;
    configure_tiles(config);
}

// Adds a chunk for kRows rows. Of two tiles with exact sums, one is multiplied and stored while the other is added up: the sums
// of a group take longer than its tile.
template <int kGroup, int kRows>
__attribute__((noinline)) void grouped_amx(
    const GroupedForm& form, const ByteGroups& rows, const GroupedChunk& chunk, bool first, RowSums* sums, int block
) {
    alignas(kCacheLine) int32_t exact[2][kRows][kVecSize];
    constexpr int kSumBytes = sizeof exact[0][0];
    // A constant for whole tiles: it makes addresses constant.
    const int tile = kRows == kTileRows ? kTileRows : rows.whole.tile;
    const int count = rows.whole_count * kRowGroup;
    const auto group_at = [&](const ByteGroup& groups, int k) __attribute__((always_inline)) {
        return ByteGroup{groups.numbers, groups.fields, tile}.skip_groups(k / kRowGroup);
    };
    // Tile numbers are literals: GCC writes them into the instruction as they are.
    const auto load_tiles = [&](const ByteGroup& groups, int k) __attribute__((always_inline)) {
        _tile_loadd(2, group_at(groups, k).row(0) + k % kRowGroup, kRowGroup);
        _tile_loadd(3, chunk.bytes + k * kVecSize, kStepBytes);
    };
    const auto multiply_even = [&](const ByteGroup& groups, int k) __attribute__((always_inline)) {
        _tile_zero(0);
        load_tiles(groups, k);
        _tile_dpbusd(0, 2, 3);
        _tile_stored(0, exact[0], kSumBytes);
    };
    const auto multiply_odd = [&](const ByteGroup& groups, int k) __attribute__((always_inline)) {
        _tile_zero(1);
        load_tiles(groups, k);
        _tile_dpbusd(1, 2, 3);
        _tile_stored(1, exact[1], kSumBytes);
    };
    typedef GroupedSums<1, kGroup, kRows, 1> Sums;
    Sums all;
    alignas(kCacheLine) typename Sums::Totals totals;
    static_assert(ByteDot<128>::kOffset == 0, "tiles multiply bytes as they are");
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(totals[i][0], first ? Reg16{} : load_regs(sums[i][block]));
    all.clear();
    const auto add = [&](int n, const ByteGroup& groups, int k) __attribute__((always_inline)) {
        const ByteGroup group = group_at(groups, k);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) all.sums[i][0].total = *reinterpret_cast<const Reg16i*>(exact[n][i]);
        all.end_weights(0, form, chunk.scales, k / kGroup, group, k % kRowGroup / kGroup);
        if ((k + kGroup) % kRowGroup == 0) all.end_rows(0, group, load_regs(chunk.scales.weight_sum[k / kRowGroup]), totals);
    };
    compiler_fence();
    multiply_even(rows.whole, 0);
    multiply_odd(rows.whole, kGroup);
    for (int k = 0; k < count; k += 2 * kGroup) {
        const int next = k + 2 * kGroup;
        add(0, rows.whole, k);
        if (next < count) multiply_even(rows.whole, next);
        add(1, rows.whole, k + kGroup);
        if (next < count) multiply_odd(rows.whole, next + kGroup);
    }
    for (unsigned left = rows.flags; left; left &= left - 1) {
        const int k = __builtin_ctz(left) * kRowGroup;
        for (int i = 0; i < kRowGroup; i += kGroup) {
            multiply_even(rows.remainder, k + i);
            add(0, rows.remainder, k + i);
        }
    }
    compiler_fence();
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(sums[i][block], load_regs(totals[i][0]));
}
#endif
