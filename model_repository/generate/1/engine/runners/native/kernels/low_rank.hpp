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

#include "fma.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

struct LowRankPart {
    const void* b;
    // `blocks` of 16 outputs read `rank` sums from `first_rank` on; a part that the adapter does not change has a rank of 0.
    int32_t blocks, first_rank, rank;
};

// An adapter's matrices for one operation.
struct LowRank {
    const void* a;
    const LowRankPart* parts;
    // Of all parts together; 0: the adapter does not change the operation.
    int32_t rank;
    // Blocks of two parts alternate, as those of gate and up do.
    int32_t interleaved;
};

struct Adapter {
    // One for each operation of the program.
    const LowRank* operations;
    int32_t max_rank, is_bf16;
};

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

// The type of s: bfloat16 where an instruction multiplies it with B in bfloat16.
template <typename T>
using SumType = RowType<T>;

// Adds the products of two ranks, or of the last one, to 16 outputs of a row.
inline void add_ranks(Reg16& total, const float* sums, const float* b) {
    total += sums[0] * load_regs(b);
    total += sums[1] * load_regs(b + kVecSize);
}

inline void add_last_rank(Reg16& total, const float* sums, const float* b) { total += sums[0] * load_regs(b); }

inline void add_ranks(Reg16& total, const float* sums, const bf16* b) {
    Reg16 even, odd;
    split_pairs(b, even, odd);
    total += sums[0] * even;
    total += sums[1] * odd;
}

inline void add_last_rank(Reg16& total, const float* sums, const bf16* b) { total += sums[0] * load_regs(b); }

#ifdef __AVX512BF16__
inline void add_ranks(Reg16& total, const bf16* sums, const bf16* b) {
    PairStep{(__m512bh)load_line(b)}.add(total, sums);
}

inline void add_last_rank(Reg16& total, const bf16* sums, const bf16* b) { total += to_float(*sums) * load_regs(b); }
#endif

// What MatmulOutput adds to the sums of an operation's rows: those of a group of rows and a pair of blocks at a time.
template <typename T>
struct LowRankTerm {
    // Work items begin at multiples of it.
    static constexpr int kGroupRows = 16;
    // A copy of an output does not share what its own thread computes.
    struct Group {
        RowSums sums[kGroupRows];
        Group() {}
        Group(const Group&) {}
    };
    // For each row its adapter, or null; null for all: no row of the step has one that changes the operation.
    const Adapter* const* adapters = nullptr;
    const SumType<T>* sums = nullptr;
    size_t stride = 0;
    // Of the operation: its number, its rows and its blocks of 16 outputs.
    int number = 0, rows = 0, blocks = 0;

    // What `compute` will read for rows [first, first + count) and one or two blocks.
    void list_reads(int first, int count, int block, int some, PrefetchList& list) const {
        for (int row = first; row < first + count; row++) {
            if (row > first && adapters[row] == adapters[row - 1]) continue;
            for (int n = 0; n < some; n++)
                if (const Part part = find(adapters[row], block + n); part.rank) list.add(part.b, part.bytes());
        }
    }

    // `block` is even; `ahead`: whether the next pair of blocks is prefetched, which the work item that follows has. Not inlined
    // into each kernel that has an output: it would double their code.
    __attribute__((noinline)) void compute(int first, int block, bool ahead, Group& group) const {
        const int end = std::min(first + kGroupRows, rows);
        for (int row = first, last; row < end; row = last) {
            for (last = row + 1; last < end && adapters[last] == adapters[row];) last++;
            for (int n = 0; n < std::min(2, blocks - block); n++) {
                const Part part = find(adapters[row], block + n);
                if (ahead && part.rank) prefetch_next(part);
                add_part(part, row, last, group.sums + (row - first), n);
            }
        }
    }

  private:
    // Rows that are summed at once: B is loaded once for them.
    static constexpr int kPassRows = 4;

    // The matrix B of one block; a rank of 0: the adapter does not change it.
    struct Part {
        const char* b = nullptr;
        int first_rank = 0, rank = 0, next_blocks = 0;
        bool is_bf16 = false;
        size_t bytes() const { return (size_t)rank * kVecSize * (is_bf16 ? sizeof(bf16) : sizeof(float)); }
    };

    Part find(const Adapter* adapter, int block) const {
        const LowRank* const matrices = adapter ? &adapter->operations[number] : nullptr;
        if (!matrices || !matrices->rank) return {};
        const LowRankPart* part = matrices->parts;
        if (matrices->interleaved) part += block % 2, block /= 2;
        else while (block >= part->blocks) block -= part++->blocks;
        Part found{nullptr, part->first_rank, part->rank, 2 - matrices->interleaved, adapter->is_bf16 != 0};
        found.b = static_cast<const char*>(part->b) + block * found.bytes();
        return found;
    }

    static void prefetch_next(const Part& part) {
        const char* const next = part.b + part.next_blocks * part.bytes();
        for (size_t i = 0; i < part.bytes(); i += kCacheLine) prefetch<kCacheLine, 2>(next + i);
    }

    // Of rows [row, end), which have one adapter.
    void add_part(const Part& part, int row, int end, RowSums* to, int n) const {
        if (!part.rank) {
            // Adding -0 changes no bit.
            for (int i = 0; i < end - row; i++) store(to[i][n], splat(-0.0f));
            return;
        }
        if constexpr (sizeof(T) != sizeof(bf16))
            if (!part.is_bf16) return expand<float>(part, row, end, to, n);
        expand<bf16>(part, row, end, to, n);
    }

    template <typename W>
    void expand(const Part& part, int row, int end, RowSums* to, int n) const {
        const W* const b = reinterpret_cast<const W*>(part.b);
        const SumType<T>* from = sums + row * stride + part.first_rank;
        for (; row + kPassRows <= end; row += kPassRows, to += kPassRows, from += kPassRows * stride)
            expand_rows<kPassRows>(b, part.rank, from, to, n);
        for (; row < end; row++, to++, from += stride) expand_rows<1>(b, part.rank, from, to, n);
    }

    template <int kRows, typename W>
    TRITONLM_INLINE void expand_rows(const W* b, int rank, const SumType<T>* from, RowSums* to, int n) const {
        Reg16 totals[kRows] = {};
        int r = 0;
        for (; r + 2 <= rank; r += 2)
#pragma GCC unroll 4
            for (int i = 0; i < kRows; i++) add_ranks(totals[i], from + i * stride + r, b + r * kVecSize);
        for (int i = 0; i < kRows; i++) {
            if (r < rank) add_last_rank(totals[i], from + i * stride + r, b + r * kVecSize);
            store(to[i][n], totals[i]);
        }
    }
};

template <typename T>
class LowRankStage {
  public:
    // Before the operations of a step.
    void begin(const Step& step) {
        runs_.clear();
        if (!step.adapter_count) return;
        adapters_.assign(step.rows, nullptr);
        stride_ = 0;
        for (int n = 0; n < step.adapter_count; n++) {
            const Adapter* const adapter = step.adapters[n];
            stride_ = std::max<size_t>(stride_, adapter->max_rank);
            for (int row = step.adapter_rows[n], end = step.adapter_rows[n + 1]; row < end; row += kRunRows)
                runs_.push_back({adapter, row, std::min(kRunRows, end - row)});
            std::fill(adapters_.begin() + step.adapter_rows[n], adapters_.begin() + step.adapter_rows[n + 1], adapter);
        }
        sums_.resize(std::max(sums_.size(), step.rows * stride_));
    }

    // The term of operation `number`, which multiplies `rows` and has so many outputs. All threads call it.
    LowRankTerm<T> shrink(const Rows<T>& rows, int outputs, int number, WorkQueue& queue) {
        int rank = 0;
        for (const Run& run : runs_) rank = std::max(rank, run.adapter->operations[number].rank);
        if (!rank) return {};
        const int blocks = (rank + kRankBlock - 1) / kRankBlock;
        queue.for_each((int)runs_.size() * blocks, [&](int i) {
            const Run& run = runs_[i / blocks];
            const LowRank& matrices = run.adapter->operations[number];
            const int first = i % blocks * kRankBlock, width = std::min(kRankBlock, matrices.rank - first);
            if (width <= 0) return;
            if (sizeof(T) == sizeof(bf16) || run.adapter->is_bf16) shrink_block<bf16>(rows, run, matrices.a, first, width);
            else if constexpr (sizeof(T) != sizeof(bf16)) shrink_block<float>(rows, run, matrices.a, first, width);
        });
        return {adapters_.data(), sums_.data(), stride_, number, (int)adapters_.size(), (outputs + kVecSize - 1) / kVecSize};
    }

  private:
    typedef RowType<T> Number;
    // Ranks of a block, and rows of a work item at most. A pass sums kPassRanks ranks of kPassRunRows rows in registers.
    static constexpr int kRankBlock = 8, kRunRows = 16, kLineInputs = 32;
    static constexpr int kPassRanks = kAccumulators == 16 ? 8 : 4, kPassRunRows = kAccumulators / kPassRanks;

    struct Run {
        const Adapter* adapter;
        int first, count;
    };

    // Ranks [first, first + width) of a run's rows.
    template <typename W>
    void shrink_block(const Rows<T>& rows, const Run& run, const void* matrix, int first, int width) {
        const W* const a = static_cast<const W*>(matrix) + (size_t)first * rows.inputs();
        int row = run.first;
        const int end = run.first + run.count;
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
        // A is read in order. What follows are its next ranks, and then B.
        constexpr size_t kAhead = 4096;
        const Number* from[kRows];
        for (int m = 0; m < kRows; m++) from[m] = rows.at(row + m);
        const size_t stride = rows.line_stride(), step = kLineInputs / kRowLine<Number> * stride;
        Reg16 totals[kRows][kRanks] = {};
        const W* weights = a + r * kLineInputs;
        for (int k = 0; k < rows.inputs(); k += kLineInputs, weights += width * kLineInputs) {
            prefetch<kRanks * kLineInputs * sizeof(W), 2>((const char*)weights + kAhead);
#pragma GCC unroll 2
            for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 8
                for (int n = 0; n < kRanks; n++) add_products(totals[m][n], from[m], stride, weights + n * kLineInputs);
                from[m] += step;
            }
        }
        for (int m = 0; m < kRows; m++)
            for (int n = 0; n < kRanks; n++) round_to(sums_[(row + m) * stride_ + first + r + n], reduce_add((Vec16)totals[m][n]));
    }

    std::vector<Run> runs_;
    std::vector<const Adapter*> adapters_;
    AlignedVector<SumType<T>> sums_;
    size_t stride_ = 0;
};
