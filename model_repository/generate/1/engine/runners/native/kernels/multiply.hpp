// Rows<T> x weights of type W: y[r][o] = sum over k of x[r][k] * w[o][k], for float32, bfloat16 and int8 weights; and an
// embedding, which is one output of such a matrix.
//
// Layout: gemm.hpp, int8.hpp, bf16_packed.hpp. W is T, or int8_t, for which the rows are quantized first.
// ISA variants: those of gemm.hpp and int8.hpp. Tests: tests/inference/test_native.py, test_int8.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "experts.hpp"
#include "gemm.hpp"
#include "int8.hpp"
#include "program.hpp"
#include "rows.hpp"
#include "thread_pool.hpp"

// The work queues of one matmul; the second is for the quantization of its rows.
struct MatmulQueues {
    WorkQueue items, quantize;

    void reset() {
        items.reset();
        quantize.reset();
    }
};

template <typename T, typename W>
class Multiplier {
  public:
    static constexpr bool kInt8 = sizeof(W) == 1;

    // Rows that are quantized are contiguous.
    static constexpr RowLayout kLayout = kInt8 ? RowLayout::kContiguous : RowLayout::kTiles;

    void reserve(size_t rows, int max_inputs) {
        if (kInt8) int8_rows_.reserve(rows, max_inputs);
    }

    // Calls `output(row, block, 16 numbers)` with the results of rows 0 to count - 1.
    template <typename Output>
    void multiply(const Rows<T>& rows, int count, const Weights& weights, MatmulQueues& queues, Output output) {
        const int outputs = (weights.outputs + kVecSize - 1) / kVecSize * kVecSize;
        if constexpr (kInt8) {
            const int inputs = rows.inputs();
            queues.quantize.for_each(count, [&](int row) { int8_rows_.quantize(rows.at(row), row, inputs); });
            matmul(int8_rows_, count, values(weights), weights.scales, inputs, outputs, queues.items, output);
        } else matmul(rows, count, packed(weights), outputs, queues.items, output);
    }

    // The same for the rows of each expert, by weights[expert].
    template <typename OutputOf>
    void multiply_experts(
        const Rows<T>& rows, const std::vector<ExpertRows>& used, const Weights* weights, MatmulQueues& queues, OutputOf output_of
    ) {
        const int inputs = rows.inputs(), pairs = (weights->outputs / kVecSize + 1) / 2;
        if constexpr (kInt8)
            queues.quantize.for_each((int)used.size(), [&](int i) {
                for (int row = used[i].first; row < used[i].first + used[i].count; row++)
                    int8_rows_.quantize(rows.at(row), row, inputs);
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
        constexpr int kContiguous = sizeof(float) / sizeof(W);
        const auto unpack = [&](const W* from, int begin, int end, float factor) {
            for (int k = begin; k < end; k++)
                to[k] = to_float(from[((k - begin) / kContiguous * kVecSize + lane) * kContiguous + k % kContiguous]) * factor;
        };
        if constexpr (kInt8) {
            unpack(values(weights) + (size_t)block * padded_inputs(width) * kVecSize, 0, width, weights.scales[id] * scale);
        } else {
            const PackedWeights<W> matrix = packed(weights);
            TileCache<W> tiles(matrix, width, block, 1, true);
            tiles.begin_chunk(0, width);
            for (int k = 0; k < width; k += kTileInputs) {
                tiles.prepare(k);
                unpack(tiles.block(0) + tiles.offset(k), k, k + kTileInputs, scale);
            }
        }
    }

  private:
    static const W* values(const Weights& weights) { return static_cast<const W*>(weights.values); }

    static PackedWeights<W> packed(const Weights& weights) {
        return {weights.values, weights.outliers, weights.outlier_offsets, ExponentTable(weights.max_exponent)};
    }

    // Blocks `block` and, if there is one, block + 1 of an expert's outputs, for all its rows.
    template <typename Output>
    void multiply_pair(
        const Rows<T>& rows, const ExpertRows& part, const Weights& weights, int block, Claim& claim, Output output
    ) const {
        const bool pair = (block + 1) * kVecSize < weights.outputs;
        if constexpr (kInt8) {
            const size_t block_size = (size_t)padded_inputs(weights.inputs) * kVecSize;
            const int limit = kMaxInt8Rows;
            const auto scaled = [&](int row, int n, Vec16 sums) {
                output(row, block + n, sums * load(weights.scales + (block + n) * kVecSize));
            };
            for (int first = 0; first < part.count && !claim.lost(); first += limit) {
                const int some = std::min(limit, part.count - first);
                const W* from = values(weights) + block * block_size;
                if (pair) int8_blocks<true>(int8_rows_, part.first + first, some, from, weights.inputs, claim, scaled);
                else int8_blocks<false>(int8_rows_, part.first + first, some, from, weights.inputs, claim, scaled);
            }
        } else {
            const PackedWeights<W> matrix = packed(weights);
            const int limit = rows_per_item<RowType<T>>(rows.inputs(), kMaxRows);
            for (int first = 0; first < part.count && !claim.lost(); first += limit) {
                const int some = std::min(limit, part.count - first);
                if (pair) gemm_blocks<true>(rows, part.first + first, some, matrix, block, claim, output);
                else gemm_blocks<false>(rows, part.first + first, some, matrix, block, claim, output);
            }
        }
    }

    // The quantized rows of the current matmul.
    Int8Rows int8_rows_;
};
