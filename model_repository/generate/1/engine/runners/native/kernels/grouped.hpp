// Matmuls of weights in groups (grouped_form.hpp) and rows in int8 (grouped_rows.hpp):
//   y[r][o] = sum over groups g of  m[r][g] * (scale[o][g] * (sum over k in g of code[o][k]))
//                                 + (sum over k in g of x[r][k]) * (minimum[o][g] - zero * scale[o][g])
//                                 + s[r][g] * scale[o][g] * (sum over k in g of xq[r][k] * code[o][k])
// The inner sums are exact integers; the outer ones are fused multiply-adds in float32, in the order of the groups, whatever the
// number of rows. So a row's result is the same bits alone and in a batch.
//
// Layout: each block of 16 outputs has its own form, so that queries and values, or gate and up, may have different ones.
// Few rows unpack codes in registers. For more, a chunk of 256 inputs is unpacked into bytes [inputs / 4][16][4] in the first-level
// cache, and all rows pass.
// ISA variants: __AMX_INT8__ (and amx_available() at run time) multiplies tiles for more than a few rows; otherwise those of
// byte_dot.hpp. Test: tests/inference/test_grouped.py.
#pragma once

#include <algorithm>
#include <climits>
#include <cstddef>

#include "amx.hpp"
#include "byte_dot.hpp"
#include "gemm.hpp"
#include "grouped_form.hpp"
#include "grouped_rows.hpp"
#include "thread_pool.hpp"

// Rows that unpack codes in registers, at most; and rows of a work item, whose sums take 60 KiB of the stack.
constexpr int kGroupedDirectRows = 4, kMaxGroupedRows = 480;
// How far ahead weights are requested from memory.
constexpr int kGroupedPrefetchAhead = 4096;

inline Reg16 to_floats(const Reg16i& numbers) {
#ifdef __AVX512F__
    return __builtin_convertvector(numbers, Vec16);
#else
    Reg16 result;
    for (int i = 0; i < kRegsPerVec; i++) result.regs[i] = __builtin_convertvector(numbers.regs[i], Reg);
    return result;
#endif
}

// total += factor * numbers: fused where the processor does that, and never left to the compiler's choice.
inline void add_product(Reg16& total, float factor, const Reg16& numbers) {
#ifdef __AVX512F__
    total = (Vec16)_mm512_fmadd_ps((__m512)numbers, _mm512_set1_ps(factor), (__m512)total);
#elif defined(__FMA__)
    for (int i = 0; i < kRegsPerVec; i++)
        total.regs[i] = (Reg)_mm256_fmadd_ps((__m256)numbers.regs[i], _mm256_set1_ps(factor), (__m256)total.regs[i]);
#else
    total += factor * numbers;
#endif
}

inline void add_product(Reg16& total, const Reg16& factors, const Reg16& numbers) {
#ifdef __AVX512F__
    total = (Vec16)_mm512_fmadd_ps((__m512)factors, (__m512)numbers, (__m512)total);
#else
    for (int i = 0; i < kRegsPerVec; i++)
#ifdef __FMA__
        total.regs[i] = (Reg)_mm256_fmadd_ps((__m256)factors.regs[i], (__m256)numbers.regs[i], (__m256)total.regs[i]);
#else
        total.regs[i] += factors.regs[i] * numbers.regs[i];
#endif
#endif
}

// The inputs that are multiplied, with those that pad a record.
inline int padded_inputs(const GroupedForm& form, int inputs) {
    const int multiple = form.two_level ? kSuperInputs : kRecordInputs;
    return (inputs + multiple - 1) / multiple * multiple;
}

// scale * sum of the codes.
TRITONLM_INLINE Reg16 scaled_sum(const Reg16& scale, const Reg16i& sum) {
    Reg16 result = to_floats(sum);
#ifdef __AVX512F__
    return scale * result;
#else
    for (int i = 0; i < kRegsPerVec; i++) result.regs[i] *= scale.regs[i];
    return result;
#endif
}

// The sum of a group's codes is its product with a row of ones.
alignas(kCacheLine) constexpr int32_t kFourOnes = 0x01010101;
inline const int8_t* four_ones() { return reinterpret_cast<const int8_t*>(&kFourOnes); }

// The sums of kRows rows and kBlocks blocks.
template <int kRows, int kBlocks>
struct GroupedSums {
    Reg16 totals[kRows][kBlocks];
    Reg16i sums[kRows][kBlocks];

    TRITONLM_INLINE void clear() {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
            for (int n = 0; n < kBlocks; n++) sums[i][n] = Reg16i{};
    }

    // Adds four inputs of block n.
    template <bool kWide>
    TRITONLM_INLINE void add(int n, const ByteDot<kWide>& dot, const Int8Group& rows, int k) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) dot.add(sums[i][n], rows.row(i) + k);
    }

    // Ends group `number` of the scales; `sum` is that of the rows' numbers, `code_sums` are those of the blocks' codes.
    TRITONLM_INLINE void end_group(
        const GroupScales* const (&scales)[kBlocks], const Reg16 (&code_sums)[kBlocks], int number, const Int8Group& rows,
        Int8Group::Field sum
    ) {
        for (int n = 0; n < kBlocks; n++) {
            const Reg16 scale = load_regs(scales[n]->scale[number]), minimum = load_regs(scales[n]->minimum[number]);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) {
                add_product(totals[i][n], rows.field(Int8Group::kMiddle, i), code_sums[n]);
                add_product(totals[i][n], rows.field(sum, i), minimum);
                add_product(totals[i][n], rows.field(Int8Group::kScale, i) * scale, to_floats(sums[i][n]));
            }
        }
        clear();
    }
};

// Requests the lines of a record that is read later: one thread reads several records at once, in too many places for the
// processor's own prefetching.
TRITONLM_INLINE void prefetch_record(const GroupedForm& form, const uint8_t* block, int k) {
    const uint8_t* from = block + form.record_offset(k) + kGroupedPrefetchAhead;
    for (int line = 0; line < form.record_bytes; line += kCacheLine) __builtin_prefetch(from + line);
}

// Few rows: all inputs.
template <Codes kCodes, int kGroup, int kRows, int kBlocks>
__attribute__((noinline)) void grouped_direct(
    const GroupedRows& rows, int m, int tile, const GroupedBlock* blocks, int inputs, RowSums* to, int to_block
) {
    typedef ByteDot<is_wide(kCodes)> Dot;
    const GroupedForm form = *blocks[0].form;
    const int padded = padded_inputs(form, inputs);
    GroupedSums<kRows, kBlocks> all = {};
    Reg16i code_sums[kBlocks] = {};
    alignas(kCacheLine) GroupScales own_scales[kBlocks];
    const GroupScales* scales[kBlocks];
    for (int n = 0; n < kBlocks; n++) scales[n] = &own_scales[n];
    const auto end = [&](int number, const Int8Group& group, Int8Group::Field sum) __attribute__((always_inline)) {
        Reg16 scaled_sums[kBlocks];
        for (int n = 0; n < kBlocks; n++) {
            scaled_sums[n] = scaled_sum(load_regs(scales[n]->scale[number]), code_sums[n]);
            code_sums[n] = Reg16i{};
        }
        all.end_group(scales, scaled_sums, number, group, sum);
    };
    for (int begin = 0; begin < padded; begin += kSuperInputs) {
        const int count = std::min(kSuperInputs, padded - begin);
        for (int n = 0; n < kBlocks; n++) load_scales(form, blocks[n].data, begin, count, Dot::kOffset, own_scales[n]);
        for (int k = 0; k < count; k += kRowGroup) {
            if (k % kRecordInputs == 0)
                for (int n = 0; n < kBlocks; n++) prefetch_record(form, blocks[n].data, begin + k);
            const Int8Group group = rows.group(m, inputs, begin + k, tile);
            const size_t offset = form.record_offset(begin + k / kRecordInputs * kRecordInputs) + form.codes_offset;
#pragma GCC unroll 4
            for (int j = 0; j < kRowGroup / 8; j++) {
#pragma GCC unroll 2
                for (int n = 0; n < kBlocks; n++) {
                    CodeBytes first, second;
                    unpack_codes<kCodes>(form, blocks[n].data + offset, k % kRecordInputs / 8 + j, first, second);
                    const Dot first_dot(first), second_dot(second);
                    all.add(n, first_dot, group, 8 * j);
                    all.add(n, second_dot, group, 8 * j + kStepInputs);
                    first_dot.add(code_sums[n], four_ones());
                    second_dot.add(code_sums[n], four_ones());
                }
                if (kGroup == 16 && j == 1) end(k / kGroup, group, Int8Group::kFirstSum);
            }
            if (kGroup == 16) end(k / kGroup + 1, group, Int8Group::kSecondSum);
            else end(k / kGroup, group, Int8Group::kSum);
        }
    }
    for (int i = 0; i < kRows; i++)
        for (int n = 0; n < kBlocks; n++) store(to[i][to_block + n], all.totals[i][n]);
}

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
    const auto product = [&](auto tile, const Int8Group& group, int k) {
        constexpr int kTile = decltype(tile)::value;
        _tile_zero(kTile);
        _tile_loadd(2, group.row(0) + k % kRowGroup, Int8Group::kRowBytes);
        _tile_loadd(3, chunk.bytes + k * kVecSize, kStepBytes);
        _tile_dpbsud(kTile, 2, 3);
        _tile_stored(kTile, exact[kTile], sizeof exact[0][0]);
    };
    for (int k = 0; k < count; k += 2 * kGroup) {
        const Int8Group second_rows = {rows.from + (kGroup == kRowGroup ? next_group : 0)};
        compiler_fence();
        product(std::integral_constant<int, 0>(), rows, k);
        product(std::integral_constant<int, 1>(), second_rows, k + kGroup);
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

// One or two blocks of a matmul. Where two have different codes or groups, they are multiplied one after the other.
class GroupedBlocks {
  public:
    GroupedBlocks(const GroupedRows& rows, int tile, int inputs, const GroupedBlock* blocks, int count)
        : rows_(rows), tile_(tile), inputs_(inputs), blocks_(blocks), count_(count) {}

    // sums[i][n] = row first + i times block n.
    void multiply(int first, int count, RowSums* sums) const {
        const bool pair = count_ == 2 && alike(*blocks_[0].form, *blocks_[1].form);
        if (count <= kGroupedDirectRows) {
            if (pair) return direct<2>(first, count, 0, sums);
            for (int n = 0; n < count_; n++) direct<1>(first, count, n, sums);
        } else
            for (int n = 0; n < count_; n += 1 + pair) chunked(first, count, n, 1 + pair, sums);
    }

  private:
    static bool alike(const GroupedForm& one, const GroupedForm& other) {
        return codes_of(one) == codes_of(other) && one.group == other.group && one.two_level == other.two_level &&
               one.has_minima == other.has_minima;
    }

    template <int kBlocks>
    void direct(int first, int count, int n, RowSums* sums) const {
        const GroupedForm& form = *blocks_[n].form;
        with_codes(form, [&](auto codes) {
            constexpr Codes kCodes = decltype(codes)::value;
            if (form.group == 16) direct_passes<kCodes, 16, kBlocks>(first, count, n, sums);
            else direct_passes<kCodes, 32, kBlocks>(first, count, n, sums);
        });
    }

    template <Codes kCodes, int kGroup, int kBlocks>
    void direct_passes(int first, int count, int n, RowSums* sums) const {
        for_each_pass<kGroupedTile, kGroupedDirectRows>(first, count, [&](int m, auto number) {
            constexpr int kRows = decltype(number)::value;
            if constexpr (kBlocks * kRows <= kAccumulators / 2)
                grouped_direct<kCodes, kGroup, kRows, kBlocks>(rows_, first + m, tile_, blocks_ + n, inputs_, sums + m, n);
            else
                for (int i = 0; i < kBlocks; i++)
                    grouped_direct<kCodes, kGroup, kRows, 1>(rows_, first + m, tile_, blocks_ + n + i, inputs_, sums + m, n + i);
        });
    }

    // All rows, a chunk at a time, for blocks n to n + blocks - 1, which are alike.
    void chunked(int first, int count, int n, int blocks, RowSums* sums) const {
        const GroupedForm& form = *blocks_[n].form;
        const int padded = padded_inputs(form, inputs_);
        GroupedChunk chunks[2];
        for (int begin = 0; begin < padded; begin += kSuperInputs) {
            const int inputs = std::min(kSuperInputs, padded - begin);
            for (int i = 0; i < blocks; i++) chunks[i].unpack(blocks_[n + i], begin, inputs);
            const bool wide = is_wide(codes_of(form)) && ByteDot<true>::kOffset;
            const auto accumulate = [&](auto is_wide, auto group) {
                accumulate_rows<decltype(is_wide)::value, decltype(group)::value>(
                    first, count, chunks, begin, inputs, n, blocks, sums);
            };
            const std::integral_constant<bool, ByteDot<true>::kOffset != 0> if_wide;
            if (form.group == 16 && wide) accumulate(if_wide, std::integral_constant<int, 16>());
            else if (form.group == 16) accumulate(std::false_type(), std::integral_constant<int, 16>());
            else if (wide) accumulate(if_wide, std::integral_constant<int, 32>());
            else accumulate(std::false_type(), std::integral_constant<int, 32>());
        }
    }

    template <bool kWide, int kGroup>
    void accumulate_rows(
        int first, int count, const GroupedChunk* chunks, int begin, int inputs, int n, int blocks, RowSums* sums
    ) const {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
        if (amx_available()) {
            begin_grouped_tiles(kGroup);
            for (int m = 0; m < count; m += kTileRows) {
                const Int8Group group = rows_.group(first + m, inputs_, begin, tile_);
                for (int i = 0; i < blocks; i++)
                    grouped_amx<kGroup>(group, GroupedRows::tile_bytes(tile_), chunks[i], inputs, begin == 0, sums + m, n + i);
            }
            return begin_matmul_tiles();
        }
#endif
        for_each_pass<kGroupedTile, kGroupedRowsPerPass>(first, count, [&](int m, auto number) {
            constexpr int kRows = decltype(number)::value;
            const Int8Group group = rows_.group(first + m, inputs_, begin, tile_);
            const size_t next = GroupedRows::tile_bytes(tile_);
            for (int i = 0; i < blocks; i++)
                grouped_accumulate<kWide, kGroup, kRows, 1>(group, next, chunks + i, inputs, begin == 0, sums + m, n + i);
        });
    }

    const GroupedRows& rows_;
    const int tile_, inputs_;
    const GroupedBlock* const blocks_;
    const int count_;
};

// Calls `output(row, n, 16 numbers)` with the results of one or two blocks.
template <typename Output>
void grouped_blocks(
    const GroupedRows& rows, int tile, int first, int count, const GroupedBlock* weights, int blocks, int inputs, Claim& claim,
    Output output
) {
    // A pass of few rows stores the sums of more.
    alignas(kCacheLine) RowSums sums[kMaxGroupedRows + kTileRows];
    GroupedBlocks(rows, tile, inputs, weights, blocks).multiply(first, count, sums);
    if (!claim.acquire()) return;
    for (int i = 0; i < count; i++)
        for (int n = 0; n < blocks; n++) output(first + i, n, load(sums[i][n]));
}

// Calls `output(row, block, 16 numbers)` with the results.
template <typename Output>
void matmul(
    const GroupedRows& rows, int count, const GroupedBlock* weights, int inputs, int blocks, WorkQueue& queue, Output output
) {
    const int tile = GroupedRows::tile_for(count), limit = rows_per_item<bf16>(inputs, kMaxGroupedRows);
    for_each_block_pair(count, limit, blocks, queue, [&](int first, int some, int block, bool pair, Claim& claim) {
        grouped_blocks(rows, tile, first, some, weights + block, 1 + pair, inputs, claim, [&](int row, int n, Vec16 sums) {
            output(row, block + n, sums);
        });
    });
}

// to = factor * output `lane` of a block.
inline void load_grouped_output(const GroupedBlock& block, int lane, int inputs, float factor, float* to) {
    const GroupedForm& form = *block.form;
    GroupedChunk chunk;
    for (int begin = 0; begin < inputs; begin += kSuperInputs) {
        chunk.unpack(block, begin, std::min(kSuperInputs, padded_inputs(form, inputs) - begin));
        load_scales(form, block.data, begin, std::min(kSuperInputs, padded_inputs(form, inputs) - begin), form.zero, chunk.scales);
        for (int k = 0; k < std::min(kSuperInputs, inputs - begin); k++) {
            const int code = chunk.bytes[(k / kStepInputs * kVecSize + lane) * kStepInputs + k % kStepInputs];
            const float scale = chunk.scales.scale[k / form.group][lane], minimum = chunk.scales.minimum[k / form.group][lane];
            to[begin + k] = ((code - form.zero) * scale + minimum) * factor;
        }
    }
}
