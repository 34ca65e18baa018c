// The LoRA adapters of a step, by operation: which rows have one, and where its matrices lie. Work items of a matmul read a
// table in order, instead of following each adapter's pointers.
//
// Layout: a run is the rows of one adapter, which are consecutive. Matrix B of part p for run r is number p * runs + r of its
// operation; those of an operation follow those of the operation before. What A and B hold: low_rank.hpp.
// ISA variants: none. Tests: tests/inference/test_native_adapters.py. It knows no operations, only their numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "prefetch.hpp"
#include "simd.hpp"
#include "step.hpp"

struct LowRankPart {
    const char* b;
    // `blocks` of 16 outputs, whose B begin `stride` bytes apart, read `rank` sums from `first_rank` on; a part that the adapter
    // does not change has a rank of 0.
    int32_t blocks, first_rank, rank, stride;
};

// An adapter's matrices for one operation.
struct LowRank {
    const char* a;
    const LowRankPart* parts;
    int64_t a_bytes;
    // `rank` is that of all parts together; 0: the adapter does not change the operation. With `interleaved` blocks of two parts
    // alternate, as those of gate and up do.
    int32_t rank, part_count, interleaved;
};

struct Adapter {
    // One for each operation of the program.
    const LowRank* operations;
    int32_t max_rank, is_bf16;
};

class StepAdapters {
  public:
    struct Run {
        const Adapter* adapter;
        int first, end;
    };

    // B of one part and one run.
    struct Matrix {
        const char* b;
        int32_t stride, first_rank, rank, block_bytes;
    };

    // A block of outputs: the matrices of its part, one for each run, and its number within the part.
    struct Block {
        const Matrix* matrices;
        int number;
        const char* b(int run) const { return matrices[run].b + (size_t)number * matrices[run].stride; }
    };

    // For operations [first, end).
    void begin(const Step& step, int first, int end) {
        runs_.clear(), matrices_.clear(), reads_.clear();
        if (!step.adapter_count) return;
        run_of_.assign(step.rows, 0);
        max_rank_ = 0;
        for (int n = 0; n < step.adapter_count; n++) {
            const Run run = {step.adapters[n], step.adapter_rows[n], step.adapter_rows[n + 1]};
            if (run.first == run.end) continue;
            std::fill(run_of_.begin() + run.first, run_of_.begin() + run.end, (int)runs_.size());
            max_rank_ = std::max<size_t>(max_rank_, run.adapter->max_rank);
            runs_.push_back(run);
        }
        operations_.assign(end, Operation{});
        for (int number = first; number < end; number++) add_operation(number);
    }

    const std::vector<Run>& runs() const { return runs_; }
    int run_of(int row) const { return run_of_[row]; }
    // Rows before it have no adapter.
    int first_row() const { return runs_.front().first; }
    int rows() const { return (int)run_of_.size(); }
    size_t max_rank() const { return max_rank_; }

    // The largest rank of an operation; 0: no adapter changes it.
    int rank(int number) const { return runs_.empty() ? 0 : operations_[number].rank; }

    Block find(int number, int block) const {
        const Operation& operation = operations_[number];
        const LowRankPart* const parts = operation.shape->parts;
        int part = 0;
        if (operation.shape->interleaved) part = block % 2, block /= 2;
        else while (block >= parts[part].blocks) block -= parts[part++].blocks;
        return {matrices_.data() + operation.first_matrix + part * runs_.size(), block};
    }

    // Part `share` of `shares` equal parts of all A of an operation, one after the other.
    void list_a(int number, int share, int shares, PrefetchList& list) const {
        if (!rank(number)) return;
        const Read *read = &reads_[operations_[number].first_read], *const last = read + runs_.size() - 1;
        const size_t lines = last->end / kCacheLine;
        size_t from = lines * share / shares * kCacheLine;
        const size_t to = lines * (share + 1) / shares * kCacheLine;
        while (read->end <= from && read < last) read++;
        for (; from < to; from = read++->end) list.add(read->a + (from - read->begin), std::min(to, read->end) - from);
    }

  private:
    // A of a run: bytes [begin, end) of all A of its operation.
    struct Read {
        const char* a;
        size_t begin, end;
    };

    struct Operation {
        // One of the adapters' matrices: their parts have the same blocks.
        const LowRank* shape = nullptr;
        size_t first_matrix = 0, first_read = 0;
        int rank = 0;
    };

    void add_operation(int number) {
        Operation& operation = operations_[number];
        for (const Run& run : runs_) {
            const LowRank& low_rank = run.adapter->operations[number];
            if (low_rank.rank) operation.shape = &low_rank;
            operation.rank = std::max(operation.rank, low_rank.rank);
        }
        if (!operation.rank) return;
        operation.first_matrix = matrices_.size(), operation.first_read = reads_.size();
        for (int part = 0; part < operation.shape->part_count; part++)
            for (const Run& run : runs_) matrices_.push_back(matrix(run.adapter, number, part));
        size_t begin = 0;
        for (const Run& run : runs_) {
            const LowRank& low_rank = run.adapter->operations[number];
            const size_t bytes = low_rank.rank ? low_rank.a_bytes : 0;
            reads_.push_back({low_rank.a, begin, begin + bytes});
            begin += bytes;
        }
    }

    static Matrix matrix(const Adapter* adapter, int number, int part_number) {
        const LowRank& low_rank = adapter->operations[number];
        if (!low_rank.rank) return {};
        const LowRankPart& part = low_rank.parts[part_number];
        const int number_bytes = adapter->is_bf16 ? sizeof(bf16) : sizeof(float);
        return {part.b, part.stride, part.first_rank, part.rank, part.rank * kVecSize * number_bytes};
    }

    std::vector<Run> runs_;
    // For each row its run.
    std::vector<int> run_of_;
    size_t max_rank_ = 0;
    std::vector<Operation> operations_;
    std::vector<Matrix> matrices_;
    std::vector<Read> reads_;
};
