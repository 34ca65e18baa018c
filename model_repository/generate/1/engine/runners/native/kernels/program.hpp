// A decoder as data: the operations of a step, in the order in which a family's Python file writes them down
// (families/*.py), and the weights that they point to. Field by field as in structures.py. interpreter.hpp runs them.
//
//   h = embedding of a row's token; for each op of `ops`: op(h and the buffers below); logits = lm_head(final_norm(h))
//
// Layout of weights: gemm.hpp, int8.hpp, bf16_packed.hpp, grouped_form.hpp; a pointer that is null means that the model has no such tensor.
// ISA variants: none. Tests: tests/inference/test_native.py, test_native_families.py.
#pragma once

#include <cstdint>

#include "bf16_packed.hpp"

// How weights lie: as numbers of the rows' type or bf16_packed, as int8.hpp says, or as grouped_form.hpp does.
enum class WeightForm : int32_t { kFull, kInt8, kGrouped };

struct Weights {
    // kGrouped: a GroupedBlock for each 16 outputs.
    const void* values;
    // kInt8 and kGrouped: a scale for each output.
    const float* scales;
    const float* bias;
    // bf16_packed.
    const Outlier* outliers;
    const int64_t* outlier_offsets;
    int32_t exponent_pairs, inputs, outputs;
    WeightForm form;
};

// Where operations read and write. Those before kNormed are float32, [rows][width]; those from kNormed on are Rows<T>, the
// inputs of matmuls.
enum class Buffer : int32_t { kResidual, kBranch, kQueries, kKeys, kNormed, kSecondNormed, kAttended, kInner };

enum class NormKind : int32_t { kNone, kRms, kLayer };

// kRms: x / sqrt(mean(x^2) + epsilon) * weight; kLayer: (x - mean) / sqrt(variance + epsilon) * weight + bias; kNone: x.
struct Norm {
    NormKind kind;
    float epsilon;
    const float *weight, *bias;
};

// kClampedSilu is that of gpt-oss, gated only: see activation.hpp.
enum class Activation : int32_t { kNone, kSilu, kGeluTanh, kGeluErf, kRelu, kReluSquared, kClampedSilu };

// residual = tokens[id] * scale + positions[p]
struct EmbedOp {
    Weights tokens;
    const float* positions;
    float scale;
};

// to = norm(from), or with `add` to += scale * norm(from)
struct NormOp {
    Buffer from, to;
    int32_t add;
    float scale;
    Norm norm;
};

// Queries, keys and values of kNormed; weights hold them one below the other. |result| <= clip, unless clip is 0. Keys go
// into the cache at once, or with `keys_follow` to kKeys, for RopeOp to store.
struct QkvOp {
    int32_t layer, keys_follow;
    float clip;
    Weights weights;
};

// Norms of each head's query and key, then rotation by rope table `table` (none if negative), then the key is stored. A
// head's norm weights begin `norm_stride` floats after those of the head before: 0 if all heads share them.
struct RopeOp {
    int32_t layer, table, norm_stride;
    Norm query_norm, key_norm;
};

// kAttended = attention(kQueries): see attention.hpp. A window of 0 is the whole context; softcap 0 is none. `sinks` and
// `slopes` (ALiBi) hold a number for each query head.
struct AttendOp {
    int32_t layer, window;
    float scale, softcap;
    const float *sinks, *slopes;
};

// to = activation(from x weights); `gated`: weights alternate 16 outputs of the gate and 16 of up, and to = activation(gate) *
// up. With `add` to += scale * (from x weights), where `row_scaled` also multiplies by the shared expert's gate.
struct MatmulOp {
    Buffer from, to;
    Activation activation;
    int32_t gated, add, row_scaled;
    float scale;
    Weights weights;
};

// A mixture of experts: `to` += scale * sum over the best `top_k` experts e of p[e] * down[e](activation(gate[e]) * up[e]), on
// kNormed. p is the softmax of the router's scores over all experts, or of the best ones only (`softmax_after`); with
// `renormalize` the p of the best ones add up to 1. `shared_gate` [hidden_size] is that of a shared expert (row_scaled).
struct ExpertsOp {
    int32_t experts, top_k, softmax_after, renormalize;
    Buffer to;
    int32_t add;
    Activation activation;
    float scale;
    // [experts][hidden_size] and [experts], in float32.
    const float *router, *router_bias, *shared_gate;
    const Weights *up, *down;
};

enum class OpKind : int32_t { kEmbed, kNorm, kQkv, kRope, kAttend, kMatmul, kExperts };

struct Op {
    OpKind kind;
    const void* arguments;
};

// Rotation: with h = `half`, dimensions d < h and d + h of a head rotate by position * inv_freq[d]; those from 2 h on do not.
// Cosines and sines are multiplied by `factor`, but for frequencies of 0, which fill `half` up.
struct RopeTable {
    const float* inv_freq;
    int32_t half;
    float factor;
};

struct Program {
    int32_t hidden_size, num_layers, num_heads, heads_per_kv, head_dim, vocab_size, op_count, table_count;
    const Op* ops;
    const RopeTable* tables;
    Norm final_norm;
    Weights lm_head;
    // logits = softcap * tanh(x * scale / softcap), or x * scale if softcap is 0.
    float logits_scale, logits_softcap;
};
