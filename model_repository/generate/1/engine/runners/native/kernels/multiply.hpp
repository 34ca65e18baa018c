// Rows<T> x weights of any form: y[r][o] = sum over k of x[r][k] * w[o][k]; and an embedding, which is one output of such a
// matrix. For int8 weights and those in groups, the rows are quantized first.
//
// Layout: gemm.hpp and bf16_packed.hpp, int8.hpp, grouped_form.hpp.
// ISA variants: those of gemm.hpp, int8.hpp and grouped.hpp. Tests: tests/inference/test_native.py, test_int8.py,
// test_grouped.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "experts.hpp"
#include "gemm.hpp"
#include "grouped.hpp"
#include "int8.hpp"
#include "matmul_output.hpp"
#include "program.hpp"
#include "rows.hpp"
#include "thread_pool.hpp"

// The work queues of one matmul; the second is for the quantization of its rows, the third for their adapters.
struct MatmulQueues {
    WorkQueue items, quantize, shrink;

    void reset(int threads) {
        items.reset(threads);
        quantize.reset(threads);
        shrink.reset(threads);
    }
};

// Sums of a work item, of one more pass than it has rows: a pass of few rows stores the sums of more.
constexpr int kMaxSums = std::max({kMaxRows + kPassRows, kMaxInt8Rows + kPassRows, kMaxGroupedRows + kTileRows});

// Rows that are only quantized to int8 are contiguous: all matrices of a model whose logits are of int8 weights.
inline RowLayout row_layout(const Weights& lm_head) {
    return lm_head.form == WeightForm::kInt8 ? RowLayout::kContiguous : RowLayout::kTiles;
}

template <typename T>
class Multiplier {
  public:
    void reserve(size_t rows, int max_inputs) {
        int8_rows_.reserve(rows, max_inputs);
        grouped_rows_.reserve(rows, max_inputs);
    }

    // Writes the results of rows 0 to count - 1. Each thread has its own `output`.
    void multiply(const Rows<T>& rows, int count, const Weights& weights, MatmulQueues& queues, MatmulOutput<T>& output) {
        const int blocks = (weights.outputs + kVecSize - 1) / kVecSize, tile = GroupedRows::tile_for(count);
        if (weights.form != WeightForm::kFull)
            queues.quantize.for_each(count, [&](int row) { quantize(rows, row, weights.form, tile); });
        const int limit = row_limit(rows.inputs(), weights.form);
        for_each_block_pair(count, limit, blocks, queues.items, [&](int first, int some, int block, bool pair, Claim& claim) {
            multiply_some(rows, first, some, weights, tile, block, 1 + pair, claim, output);
        });
    }

    // The same for the rows of each expert, by weights[expert], with output_of(weights[expert]).
    template <typename OutputOf>
    void multiply_experts(
        const Rows<T>& rows, const std::vector<ExpertRows>& used, const Weights* weights, MatmulQueues& queues, OutputOf output_of
    ) {
        const int pairs = (weights->outputs / kVecSize + 1) / 2;
        // The experts' weights may differ in form: a file may leave some of them as they were.
        queues.quantize.for_each((int)used.size(), [&](int i) {
            const WeightForm form = weights[used[i].expert].form;
            if (form == WeightForm::kFull) return;
            for (int row = used[i].first; row < used[i].first + used[i].count; row++) quantize(rows, row, form, kGroupedTile);
        });
        queues.items.for_each_redundant((int)used.size() * pairs, [&](int i, Claim& claim) {
            const ExpertRows part = used[i / pairs];
            MatmulOutput<T> output = output_of(weights[part.expert]);
            multiply_pair(rows, part, weights[part.expert], i % pairs * 2, claim, output);
        });
    }

    // to = scale * output `id` of the weights.
    void load_embedding(const Weights& weights, int id, float scale, float* to) const {
        const int width = weights.inputs, block = id / kVecSize, lane = id % kVecSize;
        switch (weights.form) {
            case WeightForm::kGrouped:
                return load_grouped_output(grouped_blocks(weights)[block], lane, width, weights.scales[id] * scale, to);
            case WeightForm::kInt8: {
                const int8_t* from = int8_values(weights) + (size_t)block * padded_inputs(width) * kVecSize;
                return unpack(from, lane, 0, width, weights.scales[id] * scale, to);
            }
            case WeightForm::kFull: {
                const PackedWeights<T> matrix = packed(weights);
                TileCache<T> tiles(matrix, width, block, 1, true);
                tiles.begin_chunk(0, width);
                for (int k = 0; k < width; k += kTileInputs) {
                    tiles.prepare(k);
                    unpack(tiles.block(0) + tiles.offset(k), lane, k, k + kTileInputs, scale, to);
                }
            }
        }
    }

  private:
    static const int8_t* int8_values(const Weights& weights) { return static_cast<const int8_t*>(weights.values); }
    static const GroupedBlock* grouped_blocks(const Weights& weights) { return static_cast<const GroupedBlock*>(weights.values); }

    static PackedWeights<T> packed(const Weights& weights) {
        return {weights.values, weights.outliers, weights.outlier_offsets, UpperBytes(weights.exponent_pairs)};
    }

    // One output, a lane of a block, for inputs [begin, end).
    template <typename W>
    static void unpack(const W* from, int lane, int begin, int end, float factor, float* to) {
        constexpr int kContiguous = sizeof(float) / sizeof(W);
        for (int k = begin; k < end; k++)
            to[k] = to_float(from[((k - begin) / kContiguous * kVecSize + lane) * kContiguous + k % kContiguous]) * factor;
    }

    void quantize(const Rows<T>& rows, int row, WeightForm form, int tile) {
        if (form == WeightForm::kInt8) int8_rows_.quantize(rows, row);
        else grouped_rows_.quantize(rows, row, tile);
    }

    // Rows of a work item, at most.
    static int row_limit(int inputs, WeightForm form) {
        if (form == WeightForm::kFull) return rows_per_item<RowType<T>>(inputs, kMaxRows);
        return form == WeightForm::kInt8 ? rows_per_item<int8_t>(inputs, kMaxInt8Rows) : grouped_rows_per_item(inputs);
    }

    // Blocks `block` and, if there is one, block + 1 of an expert's outputs, for all its rows.
    void multiply_pair(
        const Rows<T>& rows, const ExpertRows& part, const Weights& weights, int block, Claim& claim, MatmulOutput<T>& output
    ) const {
        const bool pair = (block + 1) * kVecSize < weights.outputs;
        const int limit = weights.form == WeightForm::kFull ? row_limit(rows.inputs(), weights.form) : kMaxInt8Rows;
        for (int first = 0; first < part.count && !claim.lost(); first += limit) {
            const int some = std::min(limit, part.count - first);
            multiply_some(rows, part.first + first, some, weights, kGroupedTile, block, 1 + pair, claim, output);
        }
    }

    // One or two blocks of outputs for some rows. Not inlined: compiled once for all operations.
    __attribute__((noinline)) void multiply_some(
        const Rows<T>& rows, int first, int count, const Weights& weights, int tile, int block, int blocks, Claim& claim,
        MatmulOutput<T>& output
    ) const {
        alignas(kCacheLine) RowSums sums[kMaxSums];
        if (weights.form == WeightForm::kFull) {
            output.prefetch_reads(first, count, block, blocks);
            multiply_blocks(rows, first, count, packed(weights), block, blocks, sums, &output.reads);
        } else if (weights.form == WeightForm::kInt8) {
            const int8_t* from = int8_values(weights) + block * (size_t)padded_inputs(weights.inputs) * kVecSize;
            multiply_int8_blocks(int8_rows_, first, count, from, weights.inputs, blocks, sums);
        } else {
            const GroupedBlock* from = grouped_blocks(weights) + block;
            GroupedBlocks(grouped_rows_, tile, weights.inputs, from, blocks).multiply(first, count, sums);
        }
        if (!claim.acquire()) return;
        if (weights.form != WeightForm::kFull) scale_sums(count, blocks, weights.scales + block * kVecSize, sums);
        output.write(first, count, block, blocks, sums);
    }

    static void scale_sums(int count, int blocks, const float* scales, RowSums* sums) {
        for (int n = 0; n < blocks; n++) {
            const Vec16 scale = load(scales + n * kVecSize);
            for (int i = 0; i < count; i++) store(sums[i][n], load(sums[i][n]) * scale);
        }
    }

    // The quantized rows of the current matmul.
    Int8Rows int8_rows_;
    GroupedRows grouped_rows_;
};
