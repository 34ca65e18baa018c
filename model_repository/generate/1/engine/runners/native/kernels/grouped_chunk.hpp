// A chunk of inputs of a block of weights in groups, unpacked into the first-level cache, and its sums with many rows.
//
// Layout: bytes [inputs / 4][16][4], and the groups' scales. The order of a row's sums is that of grouped_sums.hpp.
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
        load_scales(form, block.data, begin, count, offset(form), scales);
        with_codes(form, [&](auto codes) { unpack<decltype(codes)::value>(form, block.data, begin, count); });
    }

  private:
    template <Codes kCodes>
    void unpack(const GroupedForm& form, const uint8_t* block, int begin, int count) {
        typedef ByteDot<is_wide(kCodes)> Dot;
        const int steps_per_group = form.group / 8;
        // Two sums of codes: each addition waits for the one before.
        Reg16i sums[2] = {};
        for (int k = 0, step = 0, group = 0; k < count; k += kRecordInputs) {
            const uint8_t* from = block + form.record_offset(begin + k) + form.codes_offset;
            for (int j = 0; j < kRecordInputs / 8; j++) {
                CodeBytes first, second;
                unpack_codes<kCodes>(form, from, j, first, second);
                first.store(bytes + (k + 8 * j) * kVecSize);
                second.store(bytes + (k + 8 * j + kStepInputs) * kVecSize);
                Dot(first).add(sums[0], four_ones());
                Dot(second).add(sums[1], four_ones());
                if (++step < steps_per_group) continue;
                sums[0] += sums[1];
                store(scales.code_sum[group], scaled_sum(load_regs(scales.scale[group]), sums[0]));
                sums[0] = sums[1] = Reg16i{};
                step = 0, group++;
            }
        }
    }

    static float offset(const GroupedForm& form) { return offset_of(codes_of(form)); }
};

// Adds a chunk for the rows of a pass.
template <bool kWide, int kGroup, int kRows, int kBlocks>
__attribute__((noinline)) void grouped_accumulate(
    const Int8Groups& rows, const GroupedChunk* chunks, bool first, RowSums* sums, int to_block
) {
    GroupedSums<kRows, kBlocks> all;
    const GroupScales* scales[kBlocks];
    for (int n = 0; n < kBlocks; n++) scales[n] = &chunks[n].scales;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) all.totals[i][n] = first ? Reg16{} : load_regs(sums[i][to_block + n]);
    all.clear();
    rows.for_each([&](int first_input, const Int8Group& group) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int k = first_input; k < first_input + kRowGroup; k += kGroup) {
#pragma GCC unroll 8
            for (int step = 0; step < kGroup; step += kStepInputs)
#pragma GCC unroll 2
                for (int n = 0; n < kBlocks; n++) {
                    const ByteDot<kWide> dot(CodeBytes::load(chunks[n].bytes + (k + step) * kVecSize));
                    all.add(n, dot, group, k - first_input + step);
                }
            const Int8Group::Field half = k == first_input ? Int8Group::kFirstSum : Int8Group::kSecondSum;
            Reg16 code_sums[kBlocks];
            for (int n = 0; n < kBlocks; n++) code_sums[n] = load_regs(scales[n]->code_sum[k / kGroup]);
            all.end_group(scales, code_sums, k / kGroup, group, kGroup == kRowGroup ? Int8Group::kSum : half);
        }
    });
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) store(sums[i][to_block + n], all.totals[i][n]);
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
    const Int8Groups& rows, const GroupedChunk& chunk, bool first, RowSums* sums, int block
) {
    alignas(kCacheLine) int32_t exact[2][kRows][kVecSize];
    constexpr int kSumBytes = sizeof exact[0][0];
    constexpr bool kWhole = kGroup == kRowGroup;
    // A constant for whole tiles: it makes addresses constant.
    const int tile = kRows == kTileRows ? kTileRows : rows.whole.tile;
    const int count = rows.whole_count * kRowGroup;
    const auto group_at = [&](int k) { return Int8Group{rows.whole.numbers, rows.whole.fields, tile}.skip_groups(k / kRowGroup); };
    // Tile numbers are literals: GCC writes them into the instruction as they are.
    const auto load_tiles = [&](int k) __attribute__((always_inline)) {
        _tile_loadd(2, group_at(k).row(0) + k % kRowGroup, kRowGroup);
        _tile_loadd(3, chunk.bytes + k * kVecSize, kStepBytes);
    };
    const auto multiply_even = [&](int k) __attribute__((always_inline)) {
        _tile_zero(0);
        load_tiles(k);
        _tile_dpbsud(0, 2, 3);
        _tile_stored(0, exact[0], kSumBytes);
    };
    const auto multiply_odd = [&](int k) __attribute__((always_inline)) {
        _tile_zero(1);
        load_tiles(k);
        _tile_dpbsud(1, 2, 3);
        _tile_stored(1, exact[1], kSumBytes);
    };
    Vec16 totals[kRows];
    const auto add_group = [&](int n, int k, const Int8Group& group, Int8Group::Field sum) __attribute__((always_inline)) {
        const int number = k / kGroup;
        const Vec16 scale = load(chunk.scales.scale[number]), minimum = load(chunk.scales.minimum[number]);
        const Vec16 code_sum = load(chunk.scales.code_sum[number]);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            const Vec16i exact_sums = *reinterpret_cast<const Vec16i*>(exact[n][i]);
            add_product(totals[i], group.field(Int8Group::kMiddle, i), code_sum);
            add_product(totals[i], group.field(sum, i), minimum);
            add_product(totals[i], group.field(Int8Group::kScale, i) * scale, to_floats(exact_sums));
        }
    };
    const auto add = [&](int n, int k, Int8Group::Field sum) __attribute__((always_inline)) { add_group(n, k, group_at(k), sum); };
    const auto add_remainder = [&](int number) __attribute__((always_inline)) {
        const Int8Group rest = Int8Group{rows.remainder.numbers, rows.remainder.fields, tile}.skip_groups(number);
        for (int i = 0; i < kRowGroup; i += kGroup) {
            const int k = number * kRowGroup + i;
            _tile_zero(0);
            _tile_loadd(2, rest.row(0) + i, kRowGroup);
            _tile_loadd(3, chunk.bytes + k * kVecSize, kStepBytes);
            _tile_dpbsud(0, 2, 3);
            _tile_stored(0, exact[0], kSumBytes);
            add_group(0, k, rest, kWhole ? Int8Group::kSum : i ? Int8Group::kSecondSum : Int8Group::kFirstSum);
        }
    };
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) totals[i] = first ? Vec16{} : load(sums[i][block]);
    compiler_fence();
    multiply_even(0);
    multiply_odd(kGroup);
    for (int k = 0; k < count; k += 2 * kGroup) {
        const int next = k + 2 * kGroup;
        add(0, k, kWhole ? Int8Group::kSum : Int8Group::kFirstSum);
        if (next < count) multiply_even(next);
        add(1, k + kGroup, kWhole ? Int8Group::kSum : Int8Group::kSecondSum);
        if (next < count) multiply_odd(next + kGroup);
    }
    for (unsigned left = rows.flags; left; left &= left - 1) add_remainder(__builtin_ctz(left));
    compiler_fence();
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(sums[i][block], totals[i]);
}
#endif
