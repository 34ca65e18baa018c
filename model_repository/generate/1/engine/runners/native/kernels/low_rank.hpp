// LoRA adapters: what an adapter adds to a matmul of its rows, in two halves:
//   shrink: s[row][r] = sum over k of A[r][k] * x[row][k], a stage of its own before the matmul
//   expand: y[row][o] += sum over r of B[o][r] * s[row][r], where MatmulOutput adds the bias; B holds the scaling
// An operation may compute several modules of the checkpoint (queries, keys and values; gate and up), each with its own A and
// B, or several parts of one. Their A lie one below the other, and each part of the outputs has its B and the ranks it reads.
//
// Layout: the rows of an adapter are consecutive. A: blocks of 8 ranks (the last one of fewer), whose memory is read in order:
//   A[r][k] at (r / 8) * 8 * inputs + ((k / 32) * width + r % 8) * 32 + k % 32, `width` being the ranks of the block
//   B[o][r] at ((o / 16) * rank + r / s * s) * 16 + (o % 16) * s + r % s, s = 1 in float32 and 2 in bfloat16, as in gemm.hpp;
//   the last rank of an odd number is alone: s = 1
// Numbers are bfloat16 or, for rows in float32, those of either type. s is in float32, and in bfloat16 where both halves are
// products of bfloat16. A sum's order depends on its row alone.
// ISA variants: those of simd.hpp; __AVX512BF16__ multiplies rows in bfloat16 with vdpbf16ps. Tests:
// tests/inference/test_native_adapters.py. It knows no operations, only their numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "low_rank_term.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "step.hpp"
#include "step_adapters.hpp"
#include "thread_pool.hpp"

// The products of 32 inputs, in 16 sums. Lines of a row are `stride` numbers apart.
#ifdef __AVX512BF16__
inline void add_products(Reg16& total, const bf16* row, size_t, const bf16* weights) {
    total = (Vec16)_mm512_dpbf16_ps((__m512)total, (__m512bh)load_line(row), (__m512bh)load_line(weights));
}
#endif

template <typename W>
TRITONLM_INLINE void add_products(Reg16& total, const float* row, size_t stride, const W* weights) {
    total += load_regs(row) * load_regs(weights);
    total += load_regs(row + stride) * load_regs(weights + kVecSize);
}

template <typename T>
class LowRankStage {
  public:
    // Before operations [first, end) of a step; rows of `step` are what they multiply.
    void begin(const Step& step, int first, int end) {
        adapters_.begin(step, first, end);
        items_.clear();
        for (const StepAdapters::Run& run : adapters_.runs())
            for (int row = run.first; row < run.end; row += kItemRows)
                items_.push_back({run.adapter, row, std::min(kItemRows, run.end - row)});
        if (!items_.empty()) sums_.resize(std::max(sums_.size(), step.rows * adapters_.max_rank()));
    }

    // The term of operation `number`, which multiplies `rows` and has so many outputs; `next` multiplies next. All threads call it.
    LowRankTerm<T> shrink(const Rows<T>& rows, int outputs, int number, int next, WorkQueue& queue) {
        const int rank = adapters_.rank(number);
        if (!rank) return {};
        const int blocks = (rank + kRankBlock - 1) / kRankBlock;
        queue.for_each((int)items_.size() * blocks, [&](int i) {
            const Item& item = items_[i / blocks];
            const LowRank& matrices = item.adapter->operations[number];
            const int first = i % blocks * kRankBlock, width = std::min(kRankBlock, matrices.rank - first);
            if (width <= 0) return;
            if (sizeof(T) == sizeof(bf16) || item.adapter->is_bf16) shrink_block<bf16>(rows, item, matrices.a, first, width);
            else if constexpr (sizeof(T) != sizeof(bf16)) shrink_block<float>(rows, item, matrices.a, first, width);
        });
        return {&adapters_, sums_.data(), adapters_.max_rank(), number, (outputs + kVecSize - 1) / kVecSize, next};
    }

  private:
    typedef RowType<T> Number;
    // Ranks of a block, and rows of a work item at most. A pass sums kPassRanks ranks of kPassRunRows rows in registers.
    static constexpr int kRankBlock = 8, kItemRows = 16, kLineInputs = 32;
    static constexpr int kPassRanks = kAccumulators == 16 ? 8 : 4, kPassRunRows = kAccumulators / kPassRanks;

    // Rows of one adapter.
    struct Item {
        const Adapter* adapter;
        int first, count;
    };

    // Ranks [first, first + width) of an item's rows.
    template <typename W>
    void shrink_block(const Rows<T>& rows, const Item& item, const char* matrix, int first, int width) {
        const W* const a = reinterpret_cast<const W*>(matrix) + (size_t)first * rows.inputs();
        int row = item.first;
        const int end = item.first + item.count;
        for (; row + kPassRunRows <= end; row += kPassRunRows) shrink_rows<kPassRunRows>(rows, row, a, first, width);
        for (; row < end; row++) shrink_rows<1>(rows, row, a, first, width);
    }

    template <int kRows, typename W>
    void shrink_rows(const Rows<T>& rows, int row, const W* a, int first, int width) {
        int r = 0;
        for (; r + kPassRanks <= width; r += kPassRanks) pass<kRows, kPassRanks>(rows, row, a, first, width, r);
        if (r + 4 <= width) pass<kRows, 4>(rows, row, a, first, width, r), r += 4;
        for (; r < width; r++) pass<kRows, 1>(rows, row, a, first, width, r);
    }

    template <int kRows, int kRanks, typename W>
    __attribute__((noinline)) void pass(const Rows<T>& rows, int row, const W* a, int first, int width, int r) {
        const Number* from[kRows];
        for (int m = 0; m < kRows; m++) from[m] = rows.at(row + m);
        const size_t stride = rows.line_stride(), step = kLineInputs / kRowLine<Number> * stride;
        Reg16 totals[kRows][kRanks] = {};
        const W* weights = a + r * kLineInputs;
        for (int k = 0; k < rows.inputs(); k += kLineInputs, weights += width * kLineInputs) {
#pragma GCC unroll 2
            for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
                for (int n = 0; n < kRanks; n++) add_products(totals[m][n], from[m], stride, weights + n * kLineInputs);
                from[m] += step;
            }
        }
        for (int m = 0; m < kRows; m++)
            for (int n = 0; n < kRanks; n++) round_to(sums_[(row + m) * adapters_.max_rank() + first + r + n], reduce_add((Vec16)totals[m][n]));
    }

    StepAdapters adapters_;
    std::vector<Item> items_;
    AlignedVector<SumType<T>> sums_;
};
