// Sums of rows in bytes (grouped_rows.hpp) and weights in groups (grouped_form.hpp) in registers; and the pass of a few rows over all
// inputs, which unpacks codes in registers.
//
// The order of a row's sums (grouped.hpp) is the same for any number of rows.
// ISA variants: those of byte_dot.hpp; __AVX512F__ and __FMA__ fuse multiplications and additions. Test:
// tests/inference/test_grouped.py.
#pragma once

#include <algorithm>
#include <cstddef>

#include "byte_dot.hpp"
#include "fma.hpp"
#include "grouped_form.hpp"
#include "grouped_rows.hpp"
#include "prefetch.hpp"

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

// Adds a group's weights to the sum of those of 32 inputs: scale * sum of the codes + group * minimum.
TRITONLM_INLINE void add_weights(Reg16& sum, const GroupedForm& form, const GroupScales& scales, int number, const Reg16& codes) {
    add_product(sum, load_regs(scales.scale[number]), codes);
    if (form.adds_minima) add_product(sum, (float)form.group, load_regs(scales.minimum[number]));
}

// The sums of kRows rows and a block, with codes that are multiplied as kCodes are.
template <Codes kCodes, int kGroup, int kRows>
struct GroupedSums {
    typedef ByteDot<kCodes, kGroup> Dot;
    static constexpr int kSums = kGroup == 16 ? ByteGroup::kSums16 : ByteGroup::kSums32;
    // What 0 stands for in the rows' bytes, and how much more than the sums in the fields theirs are.
    static constexpr int kZero = Dot::kUnsignedRows ? ByteGroup::kLowest : ByteGroup::kLow;
    static constexpr float kMoreThanSums = Dot::kUnsignedRows ? kByteMiddle * kGroup : 0;
    // Those of the rows' groups that are complete.
    typedef float Totals[kRows][kVecSize];
    // That of the current group, before its scale.
    Reg16 scaled[kRows];
    typename Dot::Sum sums[kRows];

    // Adds four inputs, from input k of the rows' group on.
    TRITONLM_INLINE void add(const Dot& dot, const ByteGroup& rows, int k) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
            sums[i].add_step(dot, (Dot::kUnsignedRows ? rows.unsigned_row(i) : rows.row(i)) + k, k % kGroup / kStepInputs);
    }

    // Ends group `number` of the scales, which is number `part` of the weights' groups in that of the rows.
    TRITONLM_INLINE void end_weights(const GroupedForm& form, const GroupScales& scales, int number, const ByteGroup& rows, int part) {
        const Reg16 scale = load_regs(scales.scale[number]);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            const Reg16 sum = to_floats(sums[i].total);
            if (part) add_product(scaled[i], scale, sum);
            else scaled[i] = scale * sum;
        }
        if (!form.adds_minima) return;
        const Reg16 minimum = load_regs(scales.minimum[number]);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) add_product(scaled[i], rows.field(kSums + part, i) + kMoreThanSums, minimum);
    }

    // Ends a group of the rows; `weight_sum` is that of its weights.
    TRITONLM_INLINE void end_rows(const ByteGroup& rows, const Reg16& weight_sum, Totals& totals) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            Reg16 total = load_regs(totals[i]);
            add_product(total, rows.field(kZero, i), weight_sum);
            add_product(total, rows.field(ByteGroup::kScale, i), scaled[i]);
            store(totals[i], total);
        }
        // Three sums of each of many rows are more than the registers hold. The compiler would not keep these in memory, but others.
        if (kGroup < kRowGroup && kAccumulators == 16) asm volatile("" : : "r"(totals) : "memory");
    }
};

// Scales and sums of weights of a block, which the first pass that shares them leaves for the others.
struct SharedScales {
    static constexpr int kMostInputs = 128 * kSuperInputs;
    alignas(kCacheLine) GroupScales chunks[kMostInputs / kSuperInputs];
    bool known = false;
};

// Whether a pass has its own scales and sums of weights, shares them with other whole passes, or follows whole passes that left them.
enum class Scales { kOwn, kShared, kKnown };

// Whether whole passes share them: with fewer registers passes are few, and fewer rows take less time for their own scales, which stay
// in the first-level cache.
constexpr bool kSharesScales = kGroupedRowsPerPass == 12;

// The rows of a pass and a block: all inputs. Blocks are read one after the other: one stream of memory is faster than two.
template <Codes kCodes, int kGroup, int kRows, Scales kScales>
__attribute__((noinline)) void grouped_direct(
    const GroupedRows& rows, int m, int tile, const GroupedBlock& block, int inputs, bool from_memory, SharedScales* shared, RowSums* to,
    int to_block
) {
    const GroupedForm form = *block.form;
    const int padded = padded_inputs(form, inputs);
    typedef GroupedSums<multiplied_as(kCodes), kGroup, kRows> Sums;
    typedef typename Sums::Dot Dot;
    Sums all;
    alignas(kCacheLine) typename Sums::Totals totals = {};
    alignas(kCacheLine) GroupScales own;
    // Of 32 inputs: a line for each bit of the codes, and one for scales.
    AheadPrefetch<bits_of(kCodes) + 1> ahead(block.data, from_memory);
    for (int begin = 0; begin < padded; begin += kSuperInputs) {
        const int count = std::min(kSuperInputs, padded - begin);
        GroupScales& scales = kScales == Scales::kOwn ? own : shared->chunks[begin / kSuperInputs];
        const bool are_known = kScales == Scales::kKnown || (kScales == Scales::kShared && shared->known);
        if (!are_known) load_scales(form, block.data, begin, count, scales);
        // The chunk's groups whose weights have been summed: remainders follow whole groups.
        int summed = are_known ? kSuperInputs / kRowGroup : 0;
        const uint8_t* const chunk = block.data + form.record_offset(begin);
        ahead.seek(chunk);
        rows.groups(m, kRows, inputs, begin, count, tile).for_each([&](int k, const ByteGroup& group) __attribute__((always_inline)) {
            const size_t record = (unsigned)k / kRecordInputs, half = (unsigned)k % kRecordInputs / kRowGroup;
            const size_t offset = record * form.record_bytes + form.codes_offset;
            const int row_group = k / kRowGroup;
            const bool is_summed = kScales == Scales::kKnown || (kScales == Scales::kShared && row_group < summed);
            Reg16 weight_sum = {};
            typename Dot::CodeSum code_sum;
            ahead.begin_part();
#pragma GCC unroll 4
            for (int j = 0; j < kRowGroup / 8; j++) {
                CodeBytes first, second;
                unpack_codes<kCodes>(form, chunk + offset, half, j, first, second);
                ahead(j, kRowGroup / 8);
                const Dot first_dot(first), second_dot(second);
                all.add(first_dot, group, 8 * j);
                all.add(second_dot, group, 8 * j + kStepInputs);
                const int step_of_group = j * 8 % kGroup / kStepInputs;
                if (!is_summed) {
                    code_sum.add_step(first_dot, step_of_group);
                    code_sum.add_step(second_dot, step_of_group + 1);
                }
                if ((j + 1) * 8 % kGroup) continue;
                const int part = j * 8 / kGroup, number = k / kGroup + part;
                all.end_weights(form, scales, number, group, part);
                if (is_summed) continue;
                add_weights(weight_sum, form, scales, number, to_floats(code_sum.total));
            }
            if (is_summed) {
                weight_sum = load_regs(scales.weight_sum[row_group]);
            } else if (kScales == Scales::kShared) {
                store(scales.weight_sum[row_group], weight_sum);
                summed = row_group + 1;
            }
            all.end_rows(group, weight_sum, totals);
        });
    }
    if (kScales == Scales::kShared) shared->known = true;
    for (int i = 0; i < kRows; i++) store(to[i][to_block], load_regs(totals[i]));
}
