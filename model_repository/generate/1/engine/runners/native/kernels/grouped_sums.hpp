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

// Whether a group's sums are of unsigned codes, and the form's zero is subtracted from them: they are exact, and few rows take less
// time for it than the codes.
constexpr bool has_unsigned_sums(Codes codes) { return kAccumulators < 16 && (codes == Codes::k4 || codes == Codes::k5); }

inline Reg16 minus(const Reg16& numbers, float number) {
    return map_floats([&](auto some) { return some - number; }, numbers);
}

// Adds a group's weights to the sum of those of 32 inputs: scale * sum of the signed codes + group * minimum.
TRITONLM_INLINE void add_weights(Reg16& sum, const GroupedForm& form, const GroupScales& scales, int number, const Reg16& codes) {
    add_product(sum, load_regs(scales.scale[number]), codes);
    if (form.has_minima) add_product(sum, (float)form.group, load_regs(scales.minimum[number]));
}

// The sums of kRows rows and kBlocks blocks, with codes of magnitudes up to kLargest.
template <int kLargest, int kGroup, int kRows, int kBlocks>
struct GroupedSums {
    static constexpr int kSums = kGroup == 16 ? ByteGroup::kSums16 : ByteGroup::kSums32;
    // Those of the rows' groups that are complete.
    typedef float Totals[kRows][kBlocks][kVecSize];
    // That of the current group, before its scale.
    Reg16 scaled[kRows][kBlocks];
    typename ByteDot<kLargest>::Sum sums[kRows][kBlocks];

    TRITONLM_INLINE void clear() {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
            for (int n = 0; n < kBlocks; n++) scaled[i][n] = Reg16{};
    }

    // Adds four inputs of block n, from input k of the rows' group on.
    TRITONLM_INLINE void add(int n, const ByteDot<kLargest>& dot, const ByteGroup& rows, int k) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) sums[i][n].add_step(dot, rows.row(i) + k, k % kGroup / kStepInputs);
    }

    // Ends group `number` of block n's scales, which is number `part` of the weights' groups in that of the rows.
    template <bool kSigned = true>
    TRITONLM_INLINE void end_weights(
        int n, const GroupedForm& form, const GroupScales& scales, int number, const ByteGroup& rows, int part
    ) {
        const Reg16 scale = load_regs(scales.scale[number]);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            Reg16 sum = to_floats(sums[i][n].total);
            if (!kSigned) sum = minus(sum, (float)form.zero * rows.field(kSums + part, i));
            add_product(scaled[i][n], scale, sum);
        }
        if (!form.has_minima) return;
        const Reg16 minimum = load_regs(scales.minimum[number]);
        constexpr float kOffsets = kGroup * ByteDot<kLargest>::kOffset;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) add_product(scaled[i][n], rows.field(kSums + part, i) - kOffsets, minimum);
    }

    // Ends a group of the rows; `weight_sum` is that of its weights of block n.
    TRITONLM_INLINE void end_rows(int n, const ByteGroup& rows, const Reg16& weight_sum, Totals& totals) {
        constexpr int kZero = ByteDot<kLargest>::kOffset ? ByteGroup::kMiddle : ByteGroup::kLow;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            Reg16 total = load_regs(totals[i][n]);
            add_product(total, rows.field(kZero, i), weight_sum);
            add_product(total, rows.field(ByteGroup::kScale, i), scaled[i][n]);
            store(totals[i][n], total);
            scaled[i][n] = Reg16{};
        }
        // Three sums of each of many rows are more than the registers hold. The compiler would not keep these in memory, but others.
        if (kGroup < kRowGroup && kAccumulators == 16) asm volatile("" : : "r"(totals) : "memory");
    }
};

// The rows of a pass: all inputs. Of kBlocks blocks, `stored` ones are stored: a single block is multiplied twice.
template <Codes kCodes, int kGroup, int kRows, int kBlocks>
__attribute__((noinline)) void grouped_direct(
    const GroupedRows& rows, int m, int tile, const GroupedBlock (&blocks)[2], int stored, int inputs, bool from_memory,
    RowSums* to, int to_block
) {
    typedef ByteDot<largest_of(kCodes)> Dot;
    constexpr bool kSigned = !has_unsigned_sums(kCodes);
    const GroupedForm form = *blocks[0].form;
    const int padded = padded_inputs(form, inputs);
    typedef GroupedSums<largest_of(kCodes), kGroup, kRows, kBlocks> Sums;
    Sums all = {};
    alignas(kCacheLine) typename Sums::Totals totals = {};
    alignas(kCacheLine) GroupScales scales[kBlocks];
    const size_t bytes = grouped_block_bytes(form, inputs), skipped = (kBlocks - 1) * bytes;
    // Of 32 inputs: a line for each bit of the codes, and one for scales.
    AheadPrefetch<bits_of(kCodes) + 1> ahead[] = {{blocks[0].data, bytes, skipped, from_memory}, {blocks[1].data, bytes, skipped, from_memory}};
    for (int begin = 0; begin < padded; begin += kSuperInputs) {
        const int count = std::min(kSuperInputs, padded - begin);
        const uint8_t* chunks[kBlocks];
        for (int n = 0; n < kBlocks; n++) {
            load_scales(form, blocks[n].data, begin, count, scales[n]);
            chunks[n] = blocks[n].data + form.record_offset(begin);
            ahead[n].seek(chunks[n]);
        }
        rows.groups(m, kRows, inputs, begin, count, tile).for_each([&](int k, const ByteGroup& group) __attribute__((always_inline)) {
            const size_t record = (unsigned)k / kRecordInputs, half = (unsigned)k % kRecordInputs / kRowGroup;
            const size_t offset = record * form.record_bytes + form.codes_offset;
            Reg16 weight_sums[kBlocks] = {};
            typename Dot::CodeSum code_sums[kBlocks];
            for (int n = 0; n < kBlocks; n++) ahead[n].begin_part();
#pragma GCC unroll 4
            for (int j = 0; j < kRowGroup / 8; j++)
#pragma GCC unroll 2
                for (int n = 0; n < kBlocks; n++) {
                    CodeBytes first, second;
                    unpack_codes<kCodes, kSigned>(form, chunks[n] + offset, half, j, first, second);
                    ahead[n](j, kRowGroup / 8);
                    const Dot first_dot(first), second_dot(second);
                    all.add(n, first_dot, group, 8 * j);
                    all.add(n, second_dot, group, 8 * j + kStepInputs);
                    const int step_of_group = j * 8 % kGroup / kStepInputs;
                    code_sums[n].add_step(first_dot, step_of_group);
                    code_sums[n].add_step(second_dot, step_of_group + 1);
                    if ((j + 1) * 8 % kGroup) continue;
                    const int part = j * 8 / kGroup, number = k / kGroup + part;
                    all.template end_weights<kSigned>(n, form, scales[n], number, group, part);
                    Reg16 codes = to_floats(code_sums[n].total);
                    if (!kSigned) codes = minus(codes, (float)(kGroup * form.zero));
                    add_weights(weight_sums[n], form, scales[n], number, codes);
                }
            for (int n = 0; n < kBlocks; n++) all.end_rows(n, group, weight_sums[n], totals);
        });
    }
    for (int n = 0; n < kBlocks; n++)
        for (int i = 0; i < kRows && n < stored; i++) store(to[i][to_block + n], load_regs(totals[i][n]));
}
