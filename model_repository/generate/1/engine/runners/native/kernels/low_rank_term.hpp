// The second half of LoRA adapters (low_rank.hpp): what MatmulOutput adds to the sums of an operation's rows,
//   expand: y[row][o] += sum over r of B[o][r] * s[row][r]
// and what a work item of the base's matmul prefetches for it: its own B, and its share of the next operation's A.
//
// Layout: low_rank.hpp's. ISA variants: those of simd.hpp; __AVX512BF16__ multiplies pairs of bfloat16 with vdpbf16ps.
// Tests: tests/inference/test_native_adapters.py. It knows no operations, only their numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "fma.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "step_adapters.hpp"

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
    // Null: no row of the step has an adapter that changes the operation.
    const StepAdapters* adapters = nullptr;
    const SumType<T>* sums = nullptr;
    size_t stride = 0;
    // Of the operation: its number and its blocks of 16 outputs; and the operation whose A is prefetched.
    int number = 0, blocks = 0, next = 0;

    // What `compute` will read for rows [first, first + count) and one or two blocks, and this item's share of the next A.
    void list_reads(int first, int count, int block, int some, PrefetchList& list) const {
        list_own(first, first + count, block, some, list);
        if (first == 0) adapters->list_a(next, block / 2, (blocks + 1) / 2, list);
    }

    // `block` is even; `ahead`: whether the next pair of blocks is prefetched, which the work item that follows has. Not inlined
    // into each kernel that has an output: it would double their code.
    __attribute__((noinline)) void compute(int first, int block, bool ahead, Group& group) const {
        const int end = std::min(first + kGroupRows, adapters->rows());
        int row = first;
        // Adding -0 changes no bit.
        for (; row < std::min(end, adapters->first_row()); row++)
            for (float* to : group.sums[row - first]) store(to, splat(-0.0f));
        if (row == end) return;
        const Pair pair = find(block, block + 1 < blocks ? 2 : 1);
        for (int run = adapters->run_of(row), last; row < end; row = last, run++) {
            last = std::min(end, adapters->runs()[run].end);
            for (int n = 0; ahead && n < pair.count; n++) prefetch_next(pair.blocks[n], run);
            add_run(pair, run, row, last, group.sums + (row - first));
        }
    }

  private:
    typedef StepAdapters::Block Block;
    // Rows that are summed at once: B is loaded once for them. Both blocks are, where their sums fit the registers.
    static constexpr int kPassRows = 4;
    static constexpr bool kPairs = kAccumulators == 16;

    struct Pair {
        Block blocks[2];
        int count;
    };

    Pair find(int block, int count) const {
        return {{adapters->find(number, block), count == 2 ? adapters->find(number, block + 1) : Block{}}, count};
    }

    void list_own(int first, int end, int block, int some, PrefetchList& list) const {
        if (end <= adapters->first_row()) return;
        const Pair pair = find(block, some);
        const int begin = adapters->run_of(std::max(first, adapters->first_row())), last = adapters->run_of(end - 1);
        for (int run = begin; run <= last; run++)
            for (int n = 0; n < some; n++)
                if (const Block& own = pair.blocks[n]; own.matrices[run].rank)
                    list.add(own.b(run), own.matrices[run].block_bytes);
    }

    static void prefetch_next(const Block& block, int run) {
        const StepAdapters::Matrix& matrix = block.matrices[run];
        const char* const next = block.b(run) + 2 * matrix.stride;
        for (int i = 0; i < matrix.block_bytes; i += kCacheLine) prefetch<kCacheLine, 2>(next + i);
    }

    // Of rows [row, end), those of a run within a group.
    void add_run(const Pair& pair, int run, int row, int end, RowSums* to) const {
        int ranks[2] = {};
        for (int n = 0; n < pair.count; n++) ranks[n] = pair.blocks[n].matrices[run].rank;
        if (kPairs && ranks[0] && ranks[0] == ranks[1]) return expand_as<2>(pair.blocks, run, row, end, to, 0);
        for (int n = 0; n < 2; n++) {
            if (ranks[n]) expand_as<1>(pair.blocks + n, run, row, end, to, n);
            else
                for (int i = 0; i < end - row; i++) store(to[i][n], splat(-0.0f));
        }
    }

    template <int kBlocks>
    void expand_as(const Block* from, int run, int row, int end, RowSums* to, int n) const {
        if constexpr (sizeof(T) != sizeof(bf16))
            if (!adapters->runs()[run].adapter->is_bf16) return expand<kBlocks, float>(from, run, row, end, to, n);
        expand<kBlocks, bf16>(from, run, row, end, to, n);
    }

    template <int kBlocks, typename W>
    void expand(const Block* from, int run, int row, int end, RowSums* to, int n) const {
        const W* b[kBlocks];
        const SumType<T>* own_sums[kBlocks];
        for (int j = 0; j < kBlocks; j++) {
            b[j] = reinterpret_cast<const W*>(from[j].b(run));
            own_sums[j] = sums + row * stride + from[j].matrices[run].first_rank;
        }
        const int rank = from->matrices[run].rank;
        for (; row + kPassRows <= end; row += kPassRows, to += kPassRows) {
            expand_rows<kPassRows, kBlocks, W>(b, own_sums, rank, to, n);
            for (int j = 0; j < kBlocks; j++) own_sums[j] += kPassRows * stride;
        }
        for (; row < end; row++, to++) {
            expand_rows<1, kBlocks, W>(b, own_sums, rank, to, n);
            for (int j = 0; j < kBlocks; j++) own_sums[j] += stride;
        }
    }

    // Blocks n to n + kBlocks - 1, which have one rank.
    template <int kRows, int kBlocks, typename W>
    TRITONLM_INLINE void expand_rows(
        const W* const (&b)[kBlocks], const SumType<T>* const (&from)[kBlocks], int rank, RowSums* to, int n
    ) const {
        Reg16 totals[kRows][kBlocks] = {};
        int r = 0;
        for (; r + 2 <= rank; r += 2)
#pragma GCC unroll 4
            for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
                for (int j = 0; j < kBlocks; j++) add_ranks(totals[i][j], from[j] + i * stride + r, b[j] + r * kVecSize);
        for (int i = 0; i < kRows; i++)
            for (int j = 0; j < kBlocks; j++) {
                if (r < rank) add_last_rank(totals[i][j], from[j] + i * stride + r, b[j] + r * kVecSize);
                store(to[i][n + j], totals[i][j]);
            }
    }
};
