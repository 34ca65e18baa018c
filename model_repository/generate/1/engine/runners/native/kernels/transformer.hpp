// One step of a decoder on a CPU: from the token ids of all rows (prompt chunks and decoding sequences) to logits. GPT-2 and
// Llama families:
//   h = embedding[id] (+ position_embedding[p]);
//   for each layer: h += attn_out(attention(rope(qkv(norm(h))))), h += mlp_down(act(mlp_up(norm(h))));
//   logits = lm_head(norm(h))
// norm is LayerNorm or RMSNorm, act is GELU or SwiGLU (silu(gate) * up), rope is absent with learned positions.
//
// Layout: activations are [rows][width] in float32 between matmuls, and Rows<T> as their inputs; the KV cache is KVLayout<T>.
// T is the type of rows, keys and values; W that of weights: T itself, or int8, for which rows are quantized. Each row is
// computed in an order that does not depend on other rows.
// ISA variants: those of gemm.hpp, int8.hpp and attention.hpp. Test: tests/inference/test_native.py.
// It knows pointers and sizes. The caller owns the memory, and knows what the rows mean.
#pragma once

#include <cmath>

#include "amx.hpp"
#include "attention.hpp"
#include "clock.hpp"
#include "gemm.hpp"
#include "int8.hpp"
#include "model.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

class Decoder {
  public:
    virtual ~Decoder() = default;
    virtual void step(ThreadPool& pool, const Step& step) = 0;
    virtual void project(ThreadPool& pool, const Project& project) = 0;
};

template <typename T, typename W>
class Transformer : public Decoder {
  public:
    explicit Transformer(const Model& model)
        : model_(model), attention_(model.num_heads, model.heads_per_kv, model.head_dim),
          query_width_(model.num_heads * model.head_dim), key_width_(query_width_ / model.heads_per_kv),
          queues_(model.num_layers * kLayerStages + kOtherStages), quantize_queues_(queues_.size()) {}

    void step(ThreadPool& pool, const Step& step) override {
        reserve(step.rows);
        attention_.begin(step, pool.size());
        for (auto& queue : queues_) queue.reset();
        for (auto& queue : quantize_queues_) queue.reset();
        clock_ = Clock(step.stage_seconds);
        progress_ = step.progress;
        pool.run([&](int thread) {
            begin_matmul_tiles();
            embed(step);
            end_stage(thread, kOther);
            for (int layer = 0; layer < model_.num_layers; layer++) run_layer(step, layer, thread);
            finish(step, thread);
            end_tiles();
        });
    }

    // The last stages of a step, for hidden states of earlier steps.
    void project(ThreadPool& pool, const Project& project) override {
        reserve(project.rows);
        for (int stage : {kFinalNorm, kLmHead}) queues_[other(stage)].reset(), quantize_queues_[other(stage)].reset();
        clock_ = Clock(project.stage_seconds);
        progress_ = project.progress;
        const int width = model_.hidden_size;
        pool.run([&](int thread) {
            begin_matmul_tiles();
            queues_[other(kFinalNorm)].for_each(project.rows, [&](int i) {
                const float* hidden = project.hidden + (size_t)project.hidden_rows[i] * width;
                for (int k = 0; k < width; k += kVecSize) store(normed_.at(i, k), load(hidden + k));
            });
            end_stage(thread, kOther);
            compute_logits(project.rows, project.logits, project.logit_stride);
            end_stage(thread, kLogits);
            end_tiles();
        });
    }

  private:
    // Each stage has a work queue: those of a layer, and the others of a step.
    enum LayerStage { kAttnNorm, kQkv, kRope, kAttend, kAttnOut, kMlpNorm, kMlpUp, kMlpDown, kLayerStages };
    enum OtherStage { kEmbed, kFinalNorm, kLmHead, kArgMax, kOtherStages };

    // The first thread measures the time, and counts the stage as done.
    void end_stage(int thread, Stage kind) {
        if (thread) return;
        clock_.lap(kind);
        __atomic_fetch_add(progress_, 1, __ATOMIC_RELAXED);
    }

    void reserve(int rows) {
        const size_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
        if (padded <= reserved_) return;
        reserved_ = padded;
        hidden_.resize(padded * model_.hidden_size);
        queries_.resize(padded * query_width_);
        const bool amx_layout = !kInt8 && uses_amx<T>();
        normed_.reserve(padded, model_.hidden_size, amx_layout);
        attended_.reserve(padded, query_width_, amx_layout);
        mlp_.reserve(padded, model_.intermediate_size, amx_layout);
        if (kInt8) int8_rows_.reserve(padded, std::max({model_.hidden_size, model_.intermediate_size, query_width_}));
        if (!model_.inv_freq) return;
        keys_.resize(padded * key_width_);
        cos_sin_.resize(padded * model_.head_dim);
    }

    int stage(int layer, int number) const { return layer * kLayerStages + number; }
    int other(int number) const { return model_.num_layers * kLayerStages + number; }

    void embed(const Step& step) {
        const int width = model_.hidden_size;
        queues_[other(kEmbed)].for_each(step.rows, [&](int row) {
            const int position = step.positions[row];
            float* to = &hidden_[(size_t)row * width];
            load_embedding(step.ids[row], to);
            if (model_.inv_freq) return compute_cos_sin(row, position);
            for (int k = 0; k < width; k += kVecSize)
                store(to + k, load(to + k) + load(model_.position_embedding + (size_t)position * width + k));
        });
    }

    // A token's embedding is output `id` of the packed matrix, which may be the LM head as well.
    void load_embedding(int id, float* to) const {
        const int width = model_.hidden_size, block = id / kVecSize, lane = id % kVecSize;
        constexpr int kContiguous = sizeof(float) / sizeof(W);
        const auto unpack = [&](const W* packed, int from, int end, float scale) {
            for (int k = from; k < end; k++)
                to[k] = to_float(packed[((k - from) / kContiguous * kVecSize + lane) * kContiguous + k % kContiguous]) * scale;
        };
        if constexpr (kInt8) {
            const W* tokens = static_cast<const W*>(model_.token_embedding.values);
            unpack(tokens + (size_t)block * padded_inputs(width) * kVecSize, 0, width, model_.token_embedding.scales[id]);
        } else {
            const PackedWeights<W> packed = packed_weights(model_.token_embedding);
            TileCache<W> weights(packed, width, block, 1, true);
            weights.begin_chunk(0, width);
            for (int k = 0; k < width; k += kTileInputs) {
                weights.prepare(k);
                unpack(weights.block(0) + weights.offset(k), k, k + kTileInputs, 1.0f);
            }
        }
    }

    static PackedWeights<W> packed_weights(const Weights& weights) {
        return {weights.values, weights.outliers, weights.outlier_offsets, ExponentTable(weights.max_exponent)};
    }

    // cos_sin_[row] = [cos(position * inv_freq), sin(position * inv_freq)]
    void compute_cos_sin(int row, int position) {
        const int half = model_.head_dim / 2;
        float* to = &cos_sin_[(size_t)row * model_.head_dim];
        for (int i = 0; i < half; i++) {
            const float angle = position * model_.inv_freq[i];
            to[i] = std::cos(angle);
            to[half + i] = std::sin(angle);
        }
    }

    // (x - mean) / sqrt(variance + epsilon) * weight + bias, or without a bias RMSNorm, whose mean is 0. Calls
    // `output(column, 16 numbers)`.
    template <typename Output>
    void normalize(const float* from, int width, const float* weight, const float* bias, Output output) const {
        Vec16 total = {}, squares = {};
        if (bias)
            for (int k = 0; k < width; k += kVecSize) total += load(from + k);
        const float mean = reduce_add(total) / width;
        for (int k = 0; k < width; k += kVecSize) {
            const Vec16 centered = load(from + k) - mean;
            squares += centered * centered;
        }
        const float inverse = 1.0f / std::sqrt(reduce_add(squares) / width + model_.epsilon);
        for (int k = 0; k < width; k += kVecSize) {
            const Vec16 scaled = (load(from + k) - mean) * inverse * load(weight + k);
            output(k, bias ? scaled + load(bias + k) : scaled);
        }
    }

    void normalize_rows(const Step& step, const float* weight, const float* bias, int stage) {
        const size_t width = model_.hidden_size;
        queues_[stage].for_each(step.rows, [&](int row) {
            const auto keep = [&](int k, Vec16 values) { store(normed_.at(row, k), values); };
            normalize(&hidden_[row * width], width, weight, bias, keep);
        });
    }

    void run_layer(const Step& step, int number, int thread) {
        const Layer& layer = model_.layer[number];
        normalize_rows(step, layer.attn_norm_weight, layer.attn_norm_bias, stage(number, kAttnNorm));
        end_stage(thread, kOther);
        T *keys = static_cast<T*>(step.keys[number]), *values = static_cast<T*>(step.values[number]);
        compute_qkv(step, layer, keys, values, stage(number, kQkv));
        end_stage(thread, kMatmul);
        if (model_.inv_freq) {
            apply_rope(step, layer, keys, stage(number, kRope));
            end_stage(thread, kOther);
        }
        attention_.attend(keys, values, queries_.data(), attended_, queues_[stage(number, kAttend)], thread);
        end_stage(thread, kAttention);
        add_matmul(step, attended_, layer.attn_out, stage(number, kAttnOut));
        end_stage(thread, kMatmul);
        normalize_rows(step, layer.mlp_norm_weight, layer.mlp_norm_bias, stage(number, kMlpNorm));
        end_stage(thread, kOther);
        compute_mlp_up(step, layer.mlp_up, stage(number, kMlpUp));
        end_stage(thread, kMatmul);
        add_matmul(step, mlp_, layer.mlp_down, stage(number, kMlpDown));
        end_stage(thread, kMatmul);
    }

    // Queries and, before RoPE, keys go to buffers; other keys and values into the cache.
    void compute_qkv(const Step& step, const Layer& layer, T* keys, T* values, int stage) {
        const int outputs = query_width_ + 2 * key_width_;
        multiply(normed_, step.rows, layer.qkv, outputs, stage, [&](int row, int column, Vec16 sums) {
            if (column < query_width_) return store(&queries_[(size_t)row * query_width_ + column], sums);
            column -= query_width_;
            if (column >= key_width_) return attention_.store_value(values, row, column - key_width_, sums);
            if (model_.inv_freq) return store(&keys_[(size_t)row * key_width_ + column], sums);
            attention_.store_key(keys, row, column, sums);
        });
    }

    // RoPE of queries, and of keys, which then go into the cache.
    void apply_rope(const Step& step, const Layer& layer, T* keys, int stage) {
        const int width = model_.head_dim, all_heads = (query_width_ + key_width_) / width;
        queues_[stage].for_each(step.rows * all_heads, [&](int i) {
            const int row = i / all_heads, head = i % all_heads;
            if (head < model_.num_heads)
                return rotate_head(&queries_[(size_t)row * query_width_ + head * width], row, layer.q_norm_weight);
            const int first = (head - model_.num_heads) * width;
            float* key = &keys_[(size_t)row * key_width_ + first];
            rotate_head(key, row, layer.k_norm_weight);
            for (int k = 0; k < width; k += kVecSize) attention_.store_key(keys, row, first + k, load(key + k));
        });
    }

    // [a, b] -> [a cos - b sin, b cos + a sin], a and b the halves of a head.
    void rotate_head(float* head, int row, const float* norm_weight) const {
        const int width = model_.head_dim, half = width / 2;
        if (norm_weight) normalize(head, width, norm_weight, nullptr, [&](int k, Vec16 values) { store(head + k, values); });
        const float* cos_sin = &cos_sin_[(size_t)row * width];
        for (int k = 0; k < half; k += kVecSize) {
            const Vec16 cosines = load(cos_sin + k), sines = load(cos_sin + half + k);
            const Vec16 first = load(head + k), second = load(head + half + k);
            store(head + k, first * cosines - second * sines);
            store(head + half + k, second * cosines + first * sines);
        }
    }

    void compute_mlp_up(const Step& step, const Weights& weights, int stage) {
        const size_t inner = model_.intermediate_size;
        if (!model_.gated)
            return multiply(normed_, step.rows, weights, inner, stage, [&](int row, int column, Vec16 sums) {
                store(mlp_.at(row, column), gelu(sums));
            });
        // 16 outputs of the gate precede the 16 of `up` that they multiply: both are of one pair of blocks.
        Vec16 gate = {};
        multiply(normed_, step.rows, weights, 2 * inner, stage, [&](int row, int column, Vec16 sums) {
            if (column % (2 * kVecSize) == 0) gate = silu(sums);
            else store(mlp_.at(row, column / (2 * kVecSize) * kVecSize), gate * sums);
        });
    }

    // Adds the matmul's result to the residual stream.
    void add_matmul(const Step& step, const Rows<T>& rows, const Weights& weights, int stage) {
        const int width = model_.hidden_size;
        multiply(rows, step.rows, weights, width, stage, [&](int row, int column, Vec16 sums) {
            float* to = &hidden_[(size_t)row * width + column];
            store(to, load(to) + sums);
        });
    }

    // rows x weights + bias. Calls `output(row, column, 16 numbers)`.
    template <typename Output>
    void multiply(const Rows<T>& rows, int count, const Weights& weights, int outputs, int stage, Output output) {
        const auto biased = [&](int row, int block, Vec16 sums) {
            output(row, block * kVecSize, weights.bias ? sums + load(weights.bias + block * kVecSize) : sums);
        };
        if constexpr (kInt8) {
            const int inputs = rows.inputs();
            quantize_queues_[stage].for_each(count, [&](int row) { int8_rows_.quantize(rows.at(row), row, inputs); });
            const W* values = static_cast<const W*>(weights.values);
            matmul(int8_rows_, count, values, weights.scales, inputs, outputs, queues_[stage], biased);
        } else matmul(rows, count, packed_weights(weights), outputs, queues_[stage], biased);
    }

    void finish(const Step& step, int thread) {
        const int width = model_.hidden_size;
        queues_[other(kFinalNorm)].for_each(step.logit_count + step.hidden_count, [&](int i) {
            const int n = i - step.logit_count, row = n < 0 ? step.logit_rows[i] : step.hidden_rows[n];
            float* hidden = n < 0 ? nullptr : step.hidden + (size_t)n * width;
            // One lambda for both: compiled once, a projected hidden state has the same bits as the step's.
            const auto keep = [&](int k, Vec16 values) {
                if (hidden) store(hidden + k, values);
                else store(normed_.at(i, k), values);
            };
            normalize(&hidden_[(size_t)row * width], width, model_.final_norm_weight, model_.final_norm_bias, keep);
        });
        end_stage(thread, kOther);
        compute_logits(step.logit_count, step.logits, step.logit_stride);
        queues_[other(kArgMax)].for_each(step.logit_count, [&](int row) {
            const ArgMax best = argmax(step.logits + (size_t)row * step.logit_stride, model_.vocab_size);
            step.max_logits[row] = best.value;
            step.argmax_ids[row] = best.index;
        });
        end_stage(thread, kLogits);
    }

    // Of the first `count` rows of normed_.
    void compute_logits(int count, float* logits, int logit_stride) {
        const int outputs = (model_.vocab_size + kVecSize - 1) / kVecSize * kVecSize;
        multiply(normed_, count, model_.lm_head, outputs, other(kLmHead), [&](int row, int column, Vec16 sums) {
            store(logits + (size_t)row * logit_stride + column, sums);
        });
    }

    static constexpr bool kInt8 = sizeof(W) == 1;

    const Model model_;
    Attention<T> attention_;
    const int query_width_, key_width_;
    // For each stage; quantize_queues_ for the rows of an int8 matmul.
    std::vector<WorkQueue> queues_, quantize_queues_;
    size_t reserved_ = 0;
    Clock clock_;
    uint64_t* progress_ = nullptr;
    // The residual stream; queries and keys before RoPE; the cosines and sines of each row's position.
    AlignedVector<float> hidden_, queries_, keys_, cos_sin_;
    // Inputs of the matmuls: qkv, mlp_up and lm_head; attn_out; mlp_down.
    Rows<T> normed_, attended_, mlp_;
    // The quantized rows of the current matmul.
    Int8Rows int8_rows_;
};
