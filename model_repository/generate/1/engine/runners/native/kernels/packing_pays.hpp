// Whether bf16_packed weights are faster than plain bfloat16 ones on this machine, by measurement: the matmul of one row, which
// waits for memory, and that of 16 rows. Unpacking pays where memory is slow for the cores that read it. Both give the same
// bits.
//
// Layout: one buffer serves as the weights of both forms, gemm.hpp's. Its contents do not change the time.
// ISA variants: those of gemm.hpp; without a byte table lookup nothing is packed. Test: tests/inference/test_bf16_packed.py.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <vector>
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "gemm.hpp"
#include "thread_pool.hpp"

class PackingTrial {
  public:
    explicit PackingTrial(int threads) : pool_(threads), offsets_(kBlocks + 1) {
        weights_.reset(static_cast<char*>(std::aligned_alloc(kLargePage, kBytes)));
        if (!weights_) return;
#ifdef MADV_HUGEPAGE
        // As the weights of a model lie (large_pages.py).
        madvise(weights_.get(), kBytes, MADV_HUGEPAGE);
#endif
        // The first write to a page takes memory for it; pages that are only read share one page of zeros.
        for_each_part([&](size_t from, size_t to) {
            for (size_t i = from; i < to; i += kPage) weights_[i] = 0;
        }, kBytes);
    }

    bool pays() { return weights_ && ratio(1) * ratio(kManyRows) < kGain * kGain; }

  private:
    // 96 MiB of plain weights: they and the packed ones are more than most last-level caches.
    static constexpr int kInputs = 2048, kBlocks = 1536;
    static constexpr size_t kBytes = (size_t)kBlocks * kInputs * kVecSize * sizeof(bf16), kPage = 4096, kLargePage = 2 << 20;
    static constexpr int kManyRows = 16, kPairs = 7;
    // The least gain, as the mean over one row and many.
    static constexpr double kGain = 0.95;

    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };

    template <typename Task>
    void for_each_part(Task task, size_t count) {
        pool_.run([&](int thread) {
            const size_t part = count / pool_.size() / 2 * 2, from = part * thread;
            task(from, thread == pool_.size() - 1 ? count : from + part);
        });
    }

    // The time with packed weights relative to that with plain ones.
    double ratio(int rows) {
        rows_.begin(rows, kInputs, RowLayout::kTiles);
        for (int row = 0; row < rows; row++)
            for (int k = 0; k < kInputs; k += kVecSize) store(rows_.at(row, k), Vec16{});
        // Neighbours change the speed of memory from one millisecond to the next: the median of pairs, not the fastest of each.
        std::array<double, kPairs> ratios;
        for (double& ratio : ratios) {
            const double plain = seconds(rows, nullptr);
            ratio = seconds(rows, offsets_.data()) / plain;
        }
        std::nth_element(ratios.begin(), ratios.begin() + kPairs / 2, ratios.end());
        return ratios[kPairs / 2];
    }

    // Of one pass over all weights, packed if there are offsets of outliers, of which there are none.
    double seconds(int rows, const int64_t* outlier_offsets) {
        const PackedWeights<bf16> weights = {weights_.get(), nullptr, outlier_offsets, UpperBytes(0)};
        const auto start = std::chrono::steady_clock::now();
        for_each_part([&](size_t from, size_t to) {
            begin_matmul_tiles();
            alignas(kCacheLine) RowSums sums[kManyRows + kPassRows];
            for (size_t block = from; block < to; block += 2)
                multiply_blocks(rows_, 0, rows, weights, (int)block, 2, sums, nullptr);
            end_tiles();
        }, kBlocks);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }

    ThreadPool pool_;
    std::vector<int64_t> offsets_;
    Rows<bf16> rows_;
    std::unique_ptr<char[], Free> weights_;
};

inline bool packing_pays(int threads) { return kCanUnpack && PackingTrial(threads).pays(); }
