// A chunk of inputs of a block of weights in groups, unpacked into the first-level cache, and its sums with many rows.
//
// Layout: codes in bytes [inputs / 4][16][4], and the groups' scales. The order of a row's sums is that of grouped_sums.hpp.
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
        typedef ByteDot<multiplied_as(kCodes), kGroup> Dot;
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
template <Codes kCodes, int kGroup, int kRows>
__attribute__((noinline)) void grouped_accumulate(
    const GroupedForm& form, const ByteGroups& rows, const GroupedChunk& chunk, bool first, RowSums* sums, int block
) {
    typedef GroupedSums<kCodes, kGroup, kRows> Sums;
    Sums all;
    alignas(kCacheLine) typename Sums::Totals totals;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(totals[i], first ? Reg16{} : load_regs(sums[i][block]));
    rows.for_each([&](int first_input, const ByteGroup& group) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int part = 0; part < kRowGroup / kGroup; part++) {
            const int k = first_input + part * kGroup;
#pragma GCC unroll 8
            for (int step = 0; step < kGroup; step += kStepInputs) {
                const typename Sums::Dot dot(CodeBytes::load(chunk.bytes + (k + step) * kVecSize));
                all.add(dot, group, part * kGroup + step);
            }
            all.end_weights(form, chunk.scales, k / kGroup, group, part);
        }
        all.end_rows(group, load_regs(chunk.scales.weight_sum[first_input / kRowGroup]), totals);
    });
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) store(sums[i][block], load_regs(totals[i]));
}

#ifdef TRITONLM_BYTE_TILES
// Tile 2 holds the bytes of a group of 16 rows, tile 3 its codes of 16 outputs; tiles 0 and 1 their exact sums.
inline void begin_grouped_tiles(int group) {
    TileConfig config;
    config.bytes[2] = group;
    config.rows[3] = group / kStepInputs;
    configure_tiles(config);
}

// The lines of the next chunk of a block that a pass prefetches, some with each group of its rows.
struct ChunkAhead {
    const uint8_t* next;
    int bytes;

    TRITONLM_INLINE void operator()() {
        for (int line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(next + line, 0, 2);
        next += bytes;
    }
};

// The exact sums of 16 rows and a group of weights: by tile 0, or 1 if kOdd. Tile numbers are literals: GCC writes them into the
// instruction as they are.
template <bool kOdd>
TRITONLM_INLINE void multiply_bytes(const uint8_t* rows, const uint8_t* codes, int32_t (&to)[kTileRows][kVecSize]) {
    constexpr int kSumBytes = sizeof to[0];
    compiler_fence();
    if constexpr (kOdd) _tile_zero(1);
    else _tile_zero(0);
    _tile_loadd(2, rows, kRowGroup);
    _tile_loadd(3, codes, kStepBytes);
    if constexpr (kOdd) {
        _tile_dpbusd(1, 2, 3);
        _tile_stored(1, to, kSumBytes);
    } else {
        _tile_dpbusd(0, 2, 3);
        _tile_stored(0, to, kSumBytes);
    }
    compiler_fence();
}

// Adds a chunk for 16 rows, whose totals stay in registers, in the order of grouped_sums.hpp. A group is multiplied while the one before
// is added, in another tile: a processor whose other thread uses tiles, too, has none to spare.
template <int kGroup, bool kMinima>
__attribute__((noinline)) void grouped_amx(
    const ByteGroups& rows, const GroupedChunk& chunk, bool first, RowSums* sums, int block, ChunkAhead& ahead
) {
    static_assert(kByteMiddle == 0 && !are_unsigned(Codes::k4), "tiles multiply unsigned bytes by signed ones");
    constexpr int kParts = kRowGroup / kGroup, kSums = kParts == 2 ? ByteGroup::kSums16 : ByteGroup::kSums32;
    alignas(kCacheLine) int32_t exact[2][kParts][kTileRows][kVecSize];
    Reg16 totals[kTileRows];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) totals[i] = first ? Reg16{} : load_regs(sums[i][block]);
    const auto multiply = [&](const ByteGroup& group, int number, auto odd) __attribute__((always_inline)) {
        constexpr bool kOdd = decltype(odd)::value;
        const uint8_t* const codes = chunk.bytes + number * kRowGroup * kVecSize;
        // Of two parts each has its own tile.
        multiply_bytes<kOdd && kParts == 1>(group.row(0), codes, exact[kOdd][0]);
        if (kParts == 2) multiply_bytes<true>(group.row(0) + kGroup, codes + kGroup * kVecSize, exact[kOdd][kParts - 1]);
    };
    const auto add = [&](const ByteGroup& group, int number, bool odd) __attribute__((always_inline)) {
        const Reg16 weight_sum = load_regs(chunk.scales.weight_sum[number]);
        Reg16 scales[kParts], minima[kParts];
        for (int part = 0; part < kParts; part++) {
            scales[part] = load_regs(chunk.scales.scale[number * kParts + part]);
            if (kMinima) minima[part] = load_regs(chunk.scales.minimum[number * kParts + part]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
            Reg16 scaled = {};
            for (int part = 0; part < kParts; part++) {
                add_product(scaled, scales[part], to_floats(*reinterpret_cast<const Reg16i*>(exact[odd][part][i])));
                if (kMinima) add_product(scaled, group.field(kSums + part, i), minima[part]);
            }
            add_product(totals[i], group.field(ByteGroup::kLow, i), weight_sum);
            add_product(totals[i], group.field(ByteGroup::kScale, i), scaled);
        }
    };
    // The rows of a whole tile: a constant makes addresses constant.
    const ByteGroup whole{rows.whole.numbers, rows.whole.fields, kTileRows};
    const ByteGroup remainder{rows.remainder.numbers, rows.remainder.fields, kTileRows};
    const auto step = [&](int i, auto odd) __attribute__((always_inline)) {
        if (i + 1 < rows.whole_count) multiply(whole.skip_groups(i + 1), i + 1, std::bool_constant<!decltype(odd)::value>());
        ahead();
        add(whole.skip_groups(i), i, decltype(odd)::value);
    };
    multiply(whole, 0, std::false_type());
    // A chunk has an even number of groups.
    for (int i = 0; i < rows.whole_count; i += 2) {
        step(i, std::false_type());
        step(i + 1, std::true_type());
    }
    for (unsigned left = rows.flags; left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        multiply(remainder.skip_groups(i), i, std::false_type());
        add(remainder.skip_groups(i), i, false);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) store(sums[i][block], totals[i]);
}
#else
inline void begin_grouped_tiles(int) {}
#endif
