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

    size_t number_bytes() const { return is_bf16 ? sizeof(bf16) : sizeof(float); }
};

// An operation whose A is prefetched while the one before it is multiplied, and its inputs. 0: none.
struct NextShrink {
    int number = 0;
    size_t inputs = 0;
};

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
    // The operation that follows.
    NextShrink next = {};

    // What `compute` will read for rows [first, first + count) and one or two blocks, and this item's share of the next A.
    void list_reads(int first, int count, int block, int some, PrefetchList& list) const {
        list_own(first, count, block, some, list);
        if (first == 0) list_next(block / 2, (blocks + 1) / 2, list);
    }

    // `block` is even; `ahead`: whether the next pair of blocks is prefetched, which the work item that follows has. Not inlined
    // into each kernel that has an output: it would double their code.
    __attribute__((noinline)) void compute(int first, int block, bool ahead, Group& group) const {
        const int end = std::min(first + kGroupRows, rows);
        for (int row = first, last; row < end; row = last) {
            for (last = row + 1; last < end && adapters[last] == adapters[row];) last++;
            const Part parts[2] = {find(adapters[row], block), block + 1 < blocks ? find(adapters[row], block + 1) : Part{}};
            for (const Part& part : parts)
                if (ahead && part.rank) prefetch_next(part);
            add_parts(parts, row, last, group.sums + (row - first));
        }
    }

  private:
    // Rows that are summed at once: B is loaded once for them. Both blocks are, where their sums fit the registers.
    static constexpr int kPassRows = 4;
    static constexpr bool kPairs = kAccumulators == 16;

    void list_own(int first, int count, int block, int some, PrefetchList& list) const {
        for (int row = first; row < first + count; row++) {
            if (row > first && adapters[row] == adapters[row - 1]) continue;
            for (int n = 0; n < some; n++)
                if (const Part part = find(adapters[row], block + n); part.rank) list.add(part.b, part.bytes());
        }
    }

    // Part `share` of `shares` equal parts of all adapters' A, one after the other.
    void list_next(int share, int shares, PrefetchList& list) const {
        size_t bytes = 0;
        for_each_next([&](const char*, size_t more) { bytes += more; });
        const size_t line = kCacheLine, lines = bytes / line;
        size_t from = lines * share / shares * line, to = lines * (share + 1) / shares * line;
        for_each_next([&](const char* a, size_t some) {
            if (from < std::min(some, to)) list.add(a + from, std::min(some, to) - from);
            from -= std::min(from, some), to -= std::min(to, some);
        });
    }

    template <typename Use>
    void for_each_next(Use use) const {
        if (!next.number) return;
        for (int row = 0; row < rows; row++) {
            if (!adapters[row] || (row && adapters[row] == adapters[row - 1])) continue;
            const LowRank& matrices = adapters[row]->operations[next.number];
            use(static_cast<const char*>(matrices.a), matrices.rank * next.inputs * adapters[row]->number_bytes());
        }
    }

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
    void add_parts(const Part (&parts)[2], int row, int end, RowSums* to) const {
        if (kPairs && parts[0].rank && parts[0].rank == parts[1].rank) return expand_as<2>(parts, row, end, to, 0);
        for (int n = 0; n < 2; n++) {
            if (parts[n].rank) expand_as<1>(parts + n, row, end, to, n);
            // Adding -0 changes no bit.
            else
                for (int i = 0; i < end - row; i++) store(to[i][n], splat(-0.0f));
        }
    }

    template <int kBlocks>
    void expand_as(const Part* parts, int row, int end, RowSums* to, int n) const {
        if constexpr (sizeof(T) != sizeof(bf16))
            if (!parts->is_bf16) return expand<kBlocks, float>(parts, row, end, to, n);
        expand<kBlocks, bf16>(parts, row, end, to, n);
    }

    template <int kBlocks, typename W>
    void expand(const Part* parts, int row, int end, RowSums* to, int n) const {
        for (; row + kPassRows <= end; row += kPassRows, to += kPassRows) expand_rows<kPassRows, kBlocks, W>(parts, row, to, n);
        for (; row < end; row++, to++) expand_rows<1, kBlocks, W>(parts, row, to, n);
    }

    // Blocks n to n + kBlocks - 1, which have one rank.
    template <int kRows, int kBlocks, typename W>
    TRITONLM_INLINE void expand_rows(const Part* parts, int row, RowSums* to, int n) const {
        Reg16 totals[kRows][kBlocks] = {};
        const W* b[kBlocks];
        const SumType<T>* from[kBlocks];
        for (int j = 0; j < kBlocks; j++) {
            b[j] = reinterpret_cast<const W*>(parts[j].b);
            from[j] = sums + row * stride + parts[j].first_rank;
        }
        const int rank = parts->rank;
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
