// Matmuls of weights in groups (grouped_form.hpp) and rows in bytes (grouped_rows.hpp):
//   y[r][o] = sum over groups G of 32 inputs of
//                 low[r][G] * (sum over k in G of w[o][k])
//               + s[r][G] * (sum over groups g of weights in G of  scale[o][g] * (sum over k in g of xq[r][k] * code[o][k])
//                                                                + minimum[o][g] * (sum over k in g of xq[r][k]))
// and the same for groups' remainders, after the groups of 256 inputs. Here codes are signed and xq is not. Where
// vpmaddubsw multiplies, xq may be signed and codes unsigned, with low and minimum to match (grouped_rows.hpp, are_unsigned).
// The inner sums are exact integers; the outer ones are fused multiply-adds in float32, in the order of the groups, whatever the
// number of rows. So a row's result is the same bits alone and in a batch.
//
// Layout: each block of 16 outputs has its own form, so that queries and values, or gate and up, may have different ones.
// Passes of rows unpack codes in registers, each again. Or, with AMX and with AVX2 for many rows, a chunk of 256 inputs is unpacked
// into bytes [inputs / 4][16][4] in the first-level cache, and all rows pass.
// ISA variants: with __AMX_INT8__ (and amx_available() at run time) more than 16 rows are multiplied in tiles; otherwise those of
// byte_dot.hpp. Test: tests/inference/test_grouped.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "amx.hpp"
#include "gemm.hpp"
#include "grouped_chunk.hpp"
#include "grouped_sums.hpp"
#include "thread_pool.hpp"

// Rows of a work item, whose sums take 60 KiB of the stack.
constexpr int kMaxGroupedRows = 480;
// Rows that unpack codes in registers, at most, in passes. With AVX-512 unpacking again takes less time than keeping bytes; with AVX2
// for two passes, which read memory more evenly.
inline int direct_rows() {
    if (amx_available()) return kTileRows;
    return kAccumulators < 16 ? 2 * kGroupedPassRows : kMaxGroupedRows;
}

// Requests the lines of a block's inputs [begin, begin + count) from memory, into the second-level cache.
__attribute__((always_inline)) inline void prefetch_chunk(const GroupedBlock& block, int begin, int count) {
    const uint8_t *from = block.data + block.form->record_offset(begin), *end = block.data + block.form->record_offset(begin + count);
    for (; from < end; from += kCacheLine) __builtin_prefetch(from, 0, 2);
}

// The group of each kind of codes that few rows unpack in registers; others are unpacked in chunks.
constexpr int direct_group(Codes codes) { return codes == Codes::k2 || codes == Codes::k3 || codes == Codes::k6 ? 16 : 32; }

// One or two blocks of a matmul. Where two have different forms, they are multiplied one after the other.
class GroupedBlocks {
  public:
    GroupedBlocks(const GroupedRows& rows, int tile, int inputs, const GroupedBlock* blocks, int count)
        : rows_(rows), tile_(tile), inputs_(inputs), blocks_(blocks), count_(count) {}

    // sums[i][n] = row first + i times block n.
    __attribute__((noinline)) void multiply(int first, int count, RowSums* sums) const {
        const bool pair = count_ == 2 && (blocks_[0].form == blocks_[1].form || alike(*blocks_[0].form, *blocks_[1].form));
        for (int n = 0; n < count_; n += 1 + pair) {
            const GroupedForm& form = *blocks_[n].form;
            const bool in_registers = count <= direct_rows() && form.group == direct_group(form.codes());
            if (!in_registers) chunked(first, count, n, 1 + pair, sums);
            else with_codes(form, [&](auto codes) { direct<decltype(codes)::value>(first, count, n, 1 + pair, sums); });
        }
    }

  private:
    static bool alike(const GroupedForm& one, const GroupedForm& other) {
        return one.codes() == other.codes() && one.group == other.group && one.two_level == other.two_level &&
               one.has_minima == other.has_minima && one.pairs == other.pairs && one.zero == other.zero &&
               !memcmp(one.table, other.table, sizeof one.table);
    }

    // Passes of rows over all inputs. The first one reads the weights from memory, and the others from the caches.
    template <Codes kCodes>
    void direct(int first, int count, int n, int blocks, RowSums* sums) const {
        if constexpr (kSharesScales)
            // The first pass is whole.
            if (count > kGroupedRowsPerPass && first % kGroupedTile == 0 && inputs_ <= SharedScales::kMostInputs)
                return direct_sharing<kCodes>(first, count, n, blocks, sums);
        passes<kCodes>(first, count, n, blocks, sums, [](int) { return nullptr; });
    }

    // The same for passes that share scales. Not inlined: scales are large, and single passes would take longer beside them.
    template <Codes kCodes>
    __attribute__((noinline)) void direct_sharing(int first, int count, int n, int blocks, RowSums* sums) const {
        SharedScales shared[2];
        passes<kCodes>(first, count, n, blocks, sums, [&](int i) { return &shared[i - n]; });
    }

    // SharedOf: the type of shared_of(block), std::nullptr_t if passes share no scales.
    template <Codes kCodes, typename SharedOf>
    void passes(int first, int count, int n, int blocks, RowSums* sums, SharedOf shared_of) const {
        for_each_pass<kGroupedTile, kGroupedRowsPerPass>(first, count, [&](int m, auto number) {
            constexpr int kRows = decltype(number)::value;
            constexpr Scales kShared = kRows == kGroupedRowsPerPass ? Scales::kShared : Scales::kKnown;
            constexpr Scales kScales = std::is_same_v<decltype(shared_of(0)), std::nullptr_t> ? Scales::kOwn : kShared;
            for (int i = n; i < n + blocks; i++)
                grouped_direct<kCodes, direct_group(kCodes), kRows, kScales>(
                    rows_, first + m, tile_, blocks_[i], inputs_, m == 0, shared_of(i), sums + m, i);
        });
    }

    // All rows, a chunk at a time, for blocks n to n + blocks - 1, which are alike.
    void chunked(int first, int count, int n, int blocks, RowSums* sums) const {
        const GroupedForm& form = *blocks_[n].form;
        const int padded = padded_inputs(form, inputs_);
        GroupedChunk chunks[2];
        if (uses_tiles()) begin_grouped_tiles(form.group);
        for (int begin = 0; begin < padded; begin += kSuperInputs) {
            const int inputs = std::min(kSuperInputs, padded - begin);
            for (int i = 0; i < blocks; i++) {
                chunks[i].unpack(blocks_[n + i], begin, inputs);
                if (!uses_tiles()) prefetch_chunk(blocks_[n + i], begin + inputs, std::min(kSuperInputs, padded - begin - inputs));
            }
            with_group(form, [&](auto group) {
                with_products(form.codes(), [&](auto codes) {
                    accumulate_rows<decltype(codes)::value, decltype(group)::value>(
                        form, first, count, chunks, begin, inputs, n, blocks, sums);
                });
            });
        }
        if (uses_tiles()) begin_matmul_tiles();
    }

#ifdef TRITONLM_BYTE_TILES
    // Rows of whole tiles.
    bool uses_tiles() const { return tile_ == kTileRows && amx_available(); }

    // Of block n the lines of at most a chunk from an input on, in `steps` steps. After the block's end follow those of the block that
    // the thread reads next, behind `blocks`.
    ChunkAhead chunk_ahead(int n, int blocks, int input, int steps) const {
        const GroupedForm& form = *blocks_[n].form;
        const size_t from = input < inputs_ ? form.record_offset(input) : grouped_block_bytes(form, inputs_) * blocks;
        const int lines = (int)form.record_offset(kSuperInputs) / (int)kCacheLine;
        return {blocks_[n].data + from, (lines + steps - 1) / steps * (int)kCacheLine};
    }
#else
    static constexpr bool uses_tiles() { return false; }
#endif

    template <Codes kCodes, int kGroup>
    void accumulate_rows(
        const GroupedForm& form, int first, int count, const GroupedChunk* chunks, int begin, int inputs, int n, int blocks,
        RowSums* sums
    ) const {
#ifdef TRITONLM_BYTE_TILES
        if (uses_tiles()) {
            const int steps = (count + kTileRows - 1) / kTileRows * (inputs / kRowGroup);
            ChunkAhead ahead[2];
            for (int i = 0; i < blocks; i++) ahead[i] = chunk_ahead(n + i, blocks, begin + inputs, steps);
            for (int m = 0; m < count; m += kTileRows) {
                const ByteGroups groups = rows_.groups(first + m, kTileRows, inputs_, begin, inputs, kTileRows);
                for (int i = 0; i < blocks; i++)
                    if (form.has_minima) grouped_amx<kGroup, true>(groups, chunks[i], begin == 0, sums + m, n + i, ahead[i]);
                    else grouped_amx<kGroup, false>(groups, chunks[i], begin == 0, sums + m, n + i, ahead[i]);
            }
            return;
        }
#endif
        for_each_pass<kGroupedTile, kGroupedRowsPerPass>(first, count, [&](int m, auto number) {
            constexpr int kRows = decltype(number)::value;
            const ByteGroups groups = rows_.groups(first + m, kRows, inputs_, begin, inputs, tile_);
            for (int i = 0; i < blocks; i++)
                grouped_accumulate<kCodes, kGroup, kRows>(form, groups, chunks[i], begin == 0, sums + m, n + i);
        });
    }

    const GroupedRows& rows_;
    const int tile_, inputs_;
    const GroupedBlock* const blocks_;
    const int count_;
};

// Rows that stay in the second-level cache beside weights and sums: 0.6 MiB of them, whole tiles of 12 or 16 rows.
inline int grouped_rows_per_item(int inputs) {
    constexpr size_t kBytes = 600 << 10, kWholeTiles = 48;
    const size_t fitting = kBytes / (padded_to_super(inputs) / kRowGroup * ByteGroup::kBytes) / kWholeTiles * kWholeTiles;
    return (int)std::clamp<size_t>(fitting, kWholeTiles, kMaxGroupedRows);
}

// to = factor * output `lane` of a block.
inline void load_grouped_output(const GroupedBlock& block, int lane, int inputs, float factor, float* to) {
    const GroupedForm& form = *block.form;
    GroupedChunk chunk;
    for (int begin = 0; begin < inputs; begin += kSuperInputs) {
        chunk.unpack(block, begin, std::min(kSuperInputs, padded_inputs(form, inputs) - begin));
        for (int k = 0; k < std::min(kSuperInputs, inputs - begin); k++) {
            const int code = (int8_t)chunk.bytes[(k / kStepInputs * kVecSize + lane) * kStepInputs + k % kStepInputs];
            const float scale = chunk.scales.scale[k / form.group][lane], minimum = chunk.scales.minimum[k / form.group][lane];
            to[begin + k] = (code * scale + minimum) * factor;
        }
    }
}
