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

    // Calls `output(row, block, 16 numbers)` with the results of rows 0 to count - 1.
    template <typename Output>
    void multiply(const Rows<T>& rows, int count, const Weights& weights, MatmulQueues& queues, Output output) {
        const int outputs = (weights.outputs + kVecSize - 1) / kVecSize * kVecSize, inputs = rows.inputs();
        switch (weights.form) {
            case WeightForm::kFull: return matmul(rows, count, packed(weights), outputs, queues.items, output);
            case WeightForm::kInt8:
                queues.quantize.for_each(count, [&](int row) { int8_rows_.quantize(rows, row); });
                return matmul(int8_rows_, count, int8_values(weights), weights.scales, inputs, outputs, queues.items, output);
            case WeightForm::kGrouped: {
                const int tile = GroupedRows::tile_for(count);
                queues.quantize.for_each(count, [&](int row) { grouped_rows_.quantize(rows, row, tile); });
                const auto scaled = [&](int row, int block, Vec16 sums) {
                    output(row, block, sums * load(weights.scales + block * kVecSize));
                };
                return matmul(grouped_rows_, count, blocks(weights), inputs, outputs / kVecSize, queues.items, scaled);
            }
        }
    }

    // The same for the rows of each expert, by weights[expert].
    template <typename OutputOf>
    void multiply_experts(
        const Rows<T>& rows, const std::vector<ExpertRows>& used, const Weights* weights, MatmulQueues& queues, OutputOf output_of
    ) {
        const int pairs = (weights->outputs / kVecSize + 1) / 2;
        // All experts' weights have one form, or are in groups that may differ.
        if (weights->form != WeightForm::kFull) queues.quantize.for_each((int)used.size(), [&](int i) {
            for (int row = used[i].first; row < used[i].first + used[i].count; row++) quantize(rows, row, weights[used[i].expert]);
        });
        queues.items.for_each_redundant((int)used.size() * pairs, [&](int i, Claim& claim) {
            const ExpertRows part = used[i / pairs];
            const int block = i % pairs * 2;
            multiply_pair(rows, part, weights[part.expert], block, claim, output_of(weights[part.expert]));
        });
    }

    // to = scale * output `id` of the weights.
    void load_embedding(const Weights& weights, int id, float scale, float* to) const {
        const int width = weights.inputs, block = id / kVecSize, lane = id % kVecSize;
        switch (weights.form) {
            case WeightForm::kGrouped:
                return load_grouped_output(blocks(weights)[block], lane, width, weights.scales[id] * scale, to);
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
    static const GroupedBlock* blocks(const Weights& weights) { return static_cast<const GroupedBlock*>(weights.values); }

    static PackedWeights<T> packed(const Weights& weights) {
        return {weights.values, weights.outliers, weights.outlier_offsets, ExponentTable(weights.max_exponent)};
    }

    // One output, a lane of a block, for inputs [begin, end).
    template <typename W>
    static void unpack(const W* from, int lane, int begin, int end, float factor, float* to) {
        constexpr int kContiguous = sizeof(float) / sizeof(W);
        for (int k = begin; k < end; k++)
            to[k] = to_float(from[((k - begin) / kContiguous * kVecSize + lane) * kContiguous + k % kContiguous]) * factor;
    }

    void quantize(const Rows<T>& rows, int row, const Weights& weights) {
        if (weights.form == WeightForm::kInt8) int8_rows_.quantize(rows, row);
        else if (weights.form == WeightForm::kGrouped) grouped_rows_.quantize(rows, row, kGroupedTile);
    }

    // Blocks `block` and, if there is one, block + 1 of an expert's outputs, for all its rows.
    template <typename Output>
    void multiply_pair(
        const Rows<T>& rows, const ExpertRows& part, const Weights& weights, int block, Claim& claim, Output output
    ) const {
        const bool pair = (block + 1) * kVecSize < weights.outputs;
        const int limit = weights.form == WeightForm::kFull ? rows_per_item<RowType<T>>(rows.inputs(), kMaxRows) : kMaxInt8Rows;
        for (int first = 0; first < part.count && !claim.lost(); first += limit) {
            const int some = std::min(limit, part.count - first);
            multiply_some(rows, part.first + first, some, weights, block, pair, claim, output);
        }
    }

    template <typename Output>
    void multiply_some(
        const Rows<T>& rows, int first, int count, const Weights& weights, int block, bool pair, Claim& claim, Output output
    ) const {
        if (weights.form == WeightForm::kFull) {
            const PackedWeights<T> matrix = packed(weights);
            if (pair) gemm_blocks<true>(rows, first, count, matrix, block, claim, output);
            else gemm_blocks<false>(rows, first, count, matrix, block, claim, output);
            return;
        }
        const auto scaled = [&](int row, int n, Vec16 sums) {
            output(row, block + n, sums * load(weights.scales + (block + n) * kVecSize));
        };
        if (weights.form == WeightForm::kGrouped) {
            const GroupedBlock* from = blocks(weights) + block;
            return grouped_blocks(grouped_rows_, kGroupedTile, first, count, from, 1 + pair, weights.inputs, claim, scaled);
        }
        const int8_t* from = int8_values(weights) + block * (size_t)padded_inputs(weights.inputs) * kVecSize;
        if (pair) int8_blocks<true>(int8_rows_, first, count, from, weights.inputs, claim, scaled);
        else int8_blocks<false>(int8_rows_, first, count, from, weights.inputs, claim, scaled);
    }

    // The quantized rows of the current matmul.
    Int8Rows int8_rows_;
    GroupedRows grouped_rows_;
};
