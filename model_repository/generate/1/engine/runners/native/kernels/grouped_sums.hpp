// Sums of rows in int8 (grouped_rows.hpp) and weights in groups (grouped_form.hpp) in registers; and the pass of a few rows over all
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

// Few rows: all inputs. Of kBlocks blocks, `stored` ones are stored: a single block is multiplied twice.
template <Codes kCodes, int kGroup, int kRows, int kBlocks>
__attribute__((noinline)) void grouped_direct(
    const GroupedRows& rows, int m, int tile, const GroupedBlock (&blocks)[2], int stored, int inputs, bool from_memory,
    RowSums* to, int to_block
) {
    typedef ByteDot<is_wide(kCodes)> Dot;
    const GroupedForm form = *blocks[0].form;
    const int padded = padded_inputs(form, inputs);
    GroupedSums<kRows, kBlocks> all = {};
    Reg16i code_sums[kBlocks] = {};
    alignas(kCacheLine) GroupScales own_scales[kBlocks];
    const GroupScales* scales[kBlocks];
    for (int n = 0; n < kBlocks; n++) scales[n] = &own_scales[n];
    const size_t bytes = grouped_block_bytes(form, inputs), skipped = (kBlocks - 1) * bytes;
    AheadPrefetch ahead[] = {{blocks[0].data, bytes, skipped, from_memory}, {blocks[1].data, bytes, skipped, from_memory}};
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
        rows.groups(m, kRows, inputs, begin, count, tile).for_each([&](int k, const Int8Group& group) __attribute__((always_inline)) {
            const size_t offset = form.record_offset(begin + k / kRecordInputs * kRecordInputs) + form.codes_offset;
#pragma GCC unroll 4
            for (int j = 0; j < kRowGroup / 8; j++) {
#pragma GCC unroll 2
                for (int n = 0; n < kBlocks; n++) {
                    const int step = k % kRecordInputs / 8 + j;
                    CodeBytes first, second;
                    unpack_codes<kCodes>(form, blocks[n].data + offset, step, first, second);
                    ahead[n].follow(blocks[n].data + offset + step * 8 * kVecSize * bits_of(kCodes) / 8);
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
        });
    }
    for (int n = 0; n < kBlocks; n++)
        for (int i = 0; i < kRows && n < stored; i++) store(to[i][to_block + n], all.totals[i][n]);
}
