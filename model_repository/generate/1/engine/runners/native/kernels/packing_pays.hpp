// Whether bf16_packed weights are faster than plain bfloat16 ones on this machine, by measurement: the matmul of one row, which
// waits for memory. Unpacking pays where memory is slow for the cores that read it. Both give the same bits.
//
// Layout: one buffer serves as the weights of both forms, gemm.hpp's. Its contents do not change the time.
// ISA variants: those of gemm.hpp; without a byte table lookup nothing is packed. Test: tests/inference/test_bf16_packed.py.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <vector>

#include "gemm.hpp"
#include "thread_pool.hpp"

class PackingTrial {
  public:
    explicit PackingTrial(int threads) : pool_(threads), offsets_(kBlocks + 1) {
        rows_.begin(1, kInputs, RowLayout::kTiles);
        weights_.reset(static_cast<char*>(std::aligned_alloc(kPage, kBytes)));
        if (!weights_) return;
        // The first write to a page takes memory for it; pages that are only read share one page of zeros.
        for_each_part([&](size_t from, size_t to) {
            for (size_t i = from; i < to; i += kPage) weights_[i] = 0;
        }, kBytes);
    }

    bool pays() {
        if (!weights_) return false;
        double plain = 1e9, packed = 1e9;
        for (int repeat = 0; repeat < 3; repeat++) {
            plain = std::min(plain, seconds(nullptr));
            packed = std::min(packed, seconds(offsets_.data()));
        }
        return packed < kGain * plain;
    }

  private:
    // 48 MiB of plain weights, more than most last-level caches.
    static constexpr int kInputs = 2048, kBlocks = 768;
    static constexpr size_t kBytes = (size_t)kBlocks * kInputs * kVecSize * sizeof(bf16), kPage = 4096;
    // The least gain: a larger number of rows gains less.
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

    // Of one pass over all weights, packed if there are offsets of outliers, of which there are none.
    double seconds(const int64_t* outlier_offsets) {
        const PackedWeights<bf16> weights = {weights_.get(), nullptr, outlier_offsets, ExponentTable(0)};
        const auto start = std::chrono::steady_clock::now();
        for_each_part([&](size_t from, size_t to) {
            begin_matmul_tiles();
            alignas(kCacheLine) RowSums sums[kTileRows];
            for (size_t block = from; block < to; block += 2) multiply_blocks(rows_, 0, 1, weights, (int)block, 2, sums);
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
