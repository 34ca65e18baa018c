// One step of a decoder on a CPU: from the token ids of all rows (prompt chunks and decoding sequences) to logits. It runs a
// family's program (program.hpp), one operation after the other; all threads share an operation's work items.
//
// Layout: buffers.hpp; the KV cache is KVLayout<T>, or KVLayout<int8_t>. T is the type of rows; each matrix has its own form of
// weights (multiply.hpp). Each row is computed in an order that does not depend on other rows.
// ISA variants: those of multiply.hpp and attention.hpp. Tests: tests/inference/test_native.py, test_native_families.py.
// It knows pointers and sizes. The caller owns the memory, and knows what the rows mean.
#pragma once

#include <algorithm>
#include <list>
#include <vector>

#include "amx.hpp"
#include "attention.hpp"
#include "buffers.hpp"
#include "clock.hpp"
#include "low_rank.hpp"
#include "matmul_output.hpp"
#include "mixture.hpp"
#include "multiply.hpp"
#include "needed_rows.hpp"
#include "normalize.hpp"
#include "program.hpp"
#include "rope.hpp"
#include "simd.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

class Decoder {
  public:
    virtual ~Decoder() = default;
    virtual void step(ThreadPool& pool, const Step& step) = 0;
    virtual void project(ThreadPool& pool, const Project& project) = 0;
};

template <typename T>
class Interpreter : public Decoder {
  public:
    // Not in loops: compiled for size.
    __attribute__((cold)) Interpreter(const Program& program, bool int8_kv)
        : program_(program), buffers_(program, row_layout(program.lm_head), int8_kv), rope_(program), int8_kv_(int8_kv),
          attention_(program.num_heads, program.heads_per_kv, program.head_dim),
          int8_attention_(program.num_heads, program.heads_per_kv, program.head_dim) {
        int queues = 0;
        max_inputs_ = buffers_.width(Buffer::kResidual);
        for (int n = 0; n < program.op_count; n++) {
            const Op& op = program.ops[n];
            first_queue_.push_back(queues);
            if (op.kind == OpKind::kExperts) mixtures_.emplace_back(arguments<ExpertsOp>(op), program.hidden_size);
            if (op.kind == OpKind::kExperts) max_inputs_ = std::max(max_inputs_, mixtures_.back().inner_size());
            if (op.kind == OpKind::kMatmul) max_inputs_ = std::max(max_inputs_, arguments<MatmulOp>(op).weights.inputs);
            mixture_of_.push_back(mixtures_.empty() ? nullptr : &mixtures_.back());
            // Of QkvOp the second are for quantization.
            queues += op.kind == OpKind::kExperts ? Mixture<T>::kStages : 1 + (op.kind == OpKind::kQkv);
        }
        next_matmul_.resize(program.op_count);
        for (int n = program.op_count, next = 0; n-- > 0;) {
            next_matmul_[n] = next;
            if (program.ops[n].kind == OpKind::kQkv || program.ops[n].kind == OpKind::kMatmul) next = n;
        }
        last_queue_ = queues;
        first_needed_op_ = first_op_of_needed_rows(program);
        queues_ = std::vector<MatmulQueues>(queues + kLastStages);
    }

    void step(ThreadPool& pool, const Step& step) override {
        reserve(step.rows);
        for (auto& queues : queues_) queues.reset(pool.size());
        clock_ = Clock(step.stage_seconds);
        progress_ = step.progress;
        if (first_needed_op_ == program_.op_count || !needed_.build(step)) return run_ops(pool, step, 0, program_.op_count);
        run_ops(pool, step, 0, first_needed_op_);
        // No thread is inside: one that is late with a repeated work item would read rows that move.
        buffers_.keep(needed_.rows());
        if (needed_.step().rows) run_ops(pool, needed_.step(), first_needed_op_, program_.op_count);
    }

    // The last stages of a step, for hidden states of earlier steps.
    void project(ThreadPool& pool, const Project& project) override {
        reserve(project.rows);
        for (LastStage stage : {kFinalNorm, kLmHead}) last(stage).reset(pool.size());
        clock_ = Clock(project.stage_seconds);
        progress_ = project.progress;
        const int width = program_.hidden_size;
        pool.run([&](int thread) {
            begin_matmul_tiles();
            Rows<T>& rows = buffers_.rows(Buffer::kNormed, width);
            last(kFinalNorm).items.for_each(project.rows, [&](int i) {
                const float* hidden = project.hidden + (size_t)project.hidden_rows[i] * width;
                for (int k = 0; k < width; k += kVecSize) store(rows.at(i, k), load(hidden + k));
            });
            end_stage(thread, kOther);
            compute_logits(project.rows, project.logits, project.logit_stride);
            end_stage(thread, kLogits);
            end_tiles();
        });
    }

  private:
    // The stages after the operations.
    enum LastStage { kFinalNorm, kLmHead, kArgMax, kLastStages };

    template <typename Arguments>
    static const Arguments& arguments(const Op& op) {
        return *static_cast<const Arguments*>(op.arguments);
    }

    // Operations [first, end), and what follows the last one.
    void run_ops(ThreadPool& pool, const Step& step, int first, int end) {
        if (int8_kv_) int8_attention_.begin(step, pool.size());
        else attention_.begin(step, pool.size());
        low_rank_.begin(step, first, program_.op_count);
        pool.run([&](int thread) {
            begin_matmul_tiles();
            for (int n = first; n < end; n++) end_stage(thread, run(step, n, thread));
            if (end == program_.op_count) finish(step, thread);
            end_tiles();
        });
    }

    MatmulQueues& last(LastStage stage) { return queues_[last_queue_ + stage]; }

    // The first thread measures the time, and counts the stage as done.
    void end_stage(int thread, Stage kind) {
        if (thread) return;
        clock_.lap(kind);
        __atomic_fetch_add(progress_, 1, __ATOMIC_RELAXED);
    }

    void reserve(int rows) {
        buffers_.begin(rows);
        const size_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
        if (padded > reserved_) grow(padded);
    }

    // Room for this many rows, a multiple of 16.
    __attribute__((cold)) void grow(size_t padded) {
        reserved_ = padded;
        buffers_.reserve(padded);
        rope_.reserve(padded);
        size_t slots = 0;
        for (auto& mixture : mixtures_) {
            mixture.reserve(padded);
            slots = std::max(slots, mixture.slots(padded));
        }
        if (slots) scratch_.reserve(slots, program_.hidden_size, mixtures_.front().inner_size(), row_layout(program_.lm_head));
        multiplier_.reserve(std::max(padded, slots), max_inputs_);
    }

    Stage run(const Step& step, int number, int thread) {
        const Op& op = program_.ops[number];
        MatmulQueues& queues = queues_[first_queue_[number]];
        switch (op.kind) {
            case OpKind::kEmbed: return embed(step, arguments<EmbedOp>(op), queues.items);
            case OpKind::kNorm: return norm(step, arguments<NormOp>(op), queues.items);
            case OpKind::kQkv: return compute_qkv(step, number, &queues);
            case OpKind::kRope: return apply_rope(step, arguments<RopeOp>(op), queues.items);
            case OpKind::kAttend: return attend(arguments<AttendOp>(op), queues.items, thread);
            case OpKind::kMatmul: return compute_matmul(step, number, queues);
            case OpKind::kExperts: return mix_experts(step, arguments<ExpertsOp>(op), *mixture_of_[number], &queues);
        }
        return kOther;
    }

    Stage embed(const Step& step, const EmbedOp& op, WorkQueue& queue) {
        queue.for_each(step.rows, [&](int row) {
            const int position = step.positions[row], width = program_.hidden_size;
            float* to = buffers_.floats(Buffer::kResidual, row);
            multiplier_.load_embedding(op.tokens, step.ids[row], op.scale, to);
            rope_.compute(row, position);
            for (int k = 0; op.positions && k < width; k += kVecSize)
                store(to + k, load(to + k) + load(op.positions + (size_t)position * width + k));
        });
        return kOther;
    }

    Stage norm(const Step& step, const NormOp& op, WorkQueue& queue) {
        const int width = buffers_.width(op.from);
        const bool to_rows = op.to >= Buffer::kNormed;
        Rows<T>* const rows = to_rows ? &buffers_.rows(op.to, width) : nullptr;
        queue.for_each(step.rows, [&](int row) {
            const float* from = buffers_.floats(op.from, row);
            if (to_rows) return normalize(op.norm, from, width, [&](int k, Vec16 values) { store(rows->at(row, k), values); });
            float* to = buffers_.floats(op.to, row);
            normalize(op.norm, from, width, [&](int k, Vec16 values) {
                store(to + k, op.add ? load(to + k) + op.scale * values : values);
            });
        });
        return kOther;
    }

    Stage compute_qkv(const Step& step, int number, MatmulQueues* queues) {
        const QkvOp& op = arguments<QkvOp>(program_.ops[number]);
        const Rows<T>& rows = buffers_.rows(Buffer::kNormed, op.weights.inputs);
        MatmulOutput<T> output{OutputKind::kQkv, op.weights.bias};
        output.stride = buffers_.width(Buffer::kQueries);
        output.key_stride = buffers_.width(Buffer::kKeys);
        output.to = buffers_.floats(Buffer::kQueries);
        output.keys = op.keys_follow || int8_kv_ ? buffers_.floats(Buffer::kKeys) : nullptr;
        output.values = int8_kv_ ? buffers_.values() : nullptr;
        output.clip = op.clip;
        output.layout = &attention_;
        if (!int8_kv_) output.key_cache = attention_.keys(op.layer), output.value_cache = attention_.values(op.layer);
        output.low_rank = low_rank_.shrink(rows, op.weights.outputs, number, next_matmul_[number], queues->shrink);
        multiplier_.multiply(rows, step.rows, op.weights, queues[0], output);
        if (int8_kv_ && !op.keys_follow) {
            const int heads = program_.num_heads / program_.heads_per_kv;
            queues[1].items.for_each(step.rows * heads, [&](int i) { store_int8(op.layer, i / heads, i % heads); });
        }
        return kMatmul;
    }

    // A row's key and value of one KV head go from the buffers into the cache.
    void store_int8(int layer, int row, int head) {
        const float* key = buffers_.floats(Buffer::kKeys, row) + head * program_.head_dim;
        const float* value = buffers_.values(row) + head * program_.head_dim;
        int8_attention_.store_head(layer, row, head, key, value);
    }

    Stage apply_rope(const Step& step, const RopeOp& op, WorkQueue& queue) {
        const int dim = program_.head_dim, heads = program_.num_heads, all_heads = heads + heads / program_.heads_per_kv;
        T* const cache = int8_kv_ ? nullptr : attention_.keys(op.layer);
        queue.for_each(step.rows * all_heads, [&](int i) {
            const int row = i / all_heads, head = i % all_heads, first = (head - heads) * dim;
            float* const queries = buffers_.floats(Buffer::kQueries, row);
            if (head < heads) return rope_.rotate(op, op.query_norm, head, row, queries + head * dim, dim);
            float* const key = buffers_.floats(Buffer::kKeys, row) + first;
            rope_.rotate(op, op.key_norm, head - heads, row, key, dim);
            if (int8_kv_) return store_int8(op.layer, row, head - heads);
            for (int k = 0; k < dim; k += kVecSize) attention_.store_key(cache, row, first + k, load(key + k));
        });
        return kOther;
    }

    Stage attend(const AttendOp& op, WorkQueue& queue, int thread) {
        Rows<T>& output = buffers_.rows(Buffer::kAttended, 0);
        const float* queries = buffers_.floats(Buffer::kQueries);
        if (int8_kv_) int8_attention_.attend(op, queries, output, queue, thread);
        else attention_.attend(op, queries, output, queue, thread);
        return kAttention;
    }

    Stage compute_matmul(const Step& step, int number, MatmulQueues& queues) {
        const MatmulOp& op = arguments<MatmulOp>(program_.ops[number]);
        const Rows<T>& rows = buffers_.rows(op.from, op.weights.inputs);
        MatmulOutput<T> output{OutputKind::kStore, op.weights.bias};
        if (op.to >= Buffer::kNormed) {
            output.kind = op.gated ? OutputKind::kGate : OutputKind::kActivate;
            output.rows = &buffers_.rows(op.to, op.weights.outputs / (1 + op.gated));
            output.activation = op.activation;
        } else {
            output.kind = op.add ? OutputKind::kAdd : OutputKind::kStore;
            output.to = buffers_.floats(op.to);
            output.stride = buffers_.width(op.to);
            output.scale = op.scale;
            output.row_scales = op.row_scaled ? mixture_of_[number]->shared_gates() : nullptr;
        }
        output.low_rank = low_rank_.shrink(rows, op.weights.outputs, number, next_matmul_[number], queues.shrink);
        multiplier_.multiply(rows, step.rows, op.weights, queues, output);
        return kMatmul;
    }

    Stage mix_experts(const Step& step, const ExpertsOp& op, Mixture<T>& mixture, MatmulQueues* queues) {
        const Rows<T>& rows = buffers_.rows(Buffer::kNormed, program_.hidden_size);
        mixture.run(rows, step.rows, buffers_.floats(op.to), scratch_, multiplier_, queues);
        return kMatmul;
    }

    void finish(const Step& step, int thread) {
        const int width = program_.hidden_size;
        Rows<T>& rows = buffers_.rows(Buffer::kNormed, width);
        last(kFinalNorm).items.for_each(step.logit_count + step.hidden_count, [&](int i) {
            const int n = i - step.logit_count, row = n < 0 ? step.logit_rows[i] : step.hidden_rows[n];
            float* hidden = n < 0 ? nullptr : step.hidden + (size_t)n * width;
            // One lambda for both: compiled once, a projected hidden state has the same bits as the step's.
            const auto keep = [&](int k, Vec16 values) {
                if (hidden) store(hidden + k, values);
                else store(rows.at(i, k), values);
            };
            normalize(program_.final_norm, buffers_.floats(Buffer::kResidual, row), width, keep);
        });
        end_stage(thread, kOther);
        compute_logits(step.logit_count, step.logits, step.logit_stride);
        last(kArgMax).items.for_each(step.logit_count, [&](int row) {
            const ArgMax best = argmax(step.logits + (size_t)row * step.logit_stride, program_.vocab_size);
            step.max_logits[row] = best.value;
            step.argmax_ids[row] = best.index;
        });
        end_stage(thread, kLogits);
    }

    // Of the first `count` rows of kNormed.
    void compute_logits(int count, float* logits, int logit_stride) {
        MatmulOutput<T> output{OutputKind::kLogits, program_.lm_head.bias};
        output.to = logits;
        output.stride = logit_stride;
        output.scale = program_.logits_scale;
        output.softcap = program_.logits_softcap;
        const Rows<T>& rows = buffers_.rows(Buffer::kNormed, program_.hidden_size);
        multiplier_.multiply(rows, count, program_.lm_head, last(kLmHead), output);
    }

    const Program program_;
    Buffers<T> buffers_;
    Multiplier<T> multiplier_;
    LowRankStage<T> low_rank_;
    NeededRows needed_;
    Rope rope_;
    const bool int8_kv_;
    Attention<T> attention_;
    Attention<int8_t> int8_attention_;
    std::list<Mixture<T>> mixtures_;
    typename Mixture<T>::Scratch scratch_;
    // For each operation its first queues, and the mixture that it is or that precedes it.
    std::vector<int> first_queue_;
    // For each operation the next one whose A may have to be prefetched; 0: none.
    std::vector<int> next_matmul_;
    std::vector<Mixture<T>*> mixture_of_;
    std::vector<MatmulQueues> queues_;
    int last_queue_ = 0, max_inputs_ = 0, first_needed_op_ = 0;
    size_t reserved_ = 0;
    Clock clock_;
    uint64_t* progress_ = nullptr;
};
