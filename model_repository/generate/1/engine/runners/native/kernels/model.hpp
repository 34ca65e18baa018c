// The weights of a decoder, as the caller passes them: Model, Layer and Weights, field by field as in structures.py. A field
// that a family does not have is null.
// Layout of weights: gemm.hpp, int8.hpp, bf16_packed.hpp. ISA variants: none. Test: tests/inference/test_native.py.
#pragma once

#include <cstdint>

#include "bf16_packed.hpp"

struct Weights {
    const void* values;
    // int8: a scale for each output.
    const float* scales;
    const float* bias;
    // bf16_packed.
    const Outlier* outliers;
    const int64_t* outlier_offsets;
    int32_t max_exponent;
};

// A norm without a bias is RMSNorm, one with a bias LayerNorm.
struct Layer {
    const float *attn_norm_weight, *attn_norm_bias, *mlp_norm_weight, *mlp_norm_bias;
    // Qwen 3: RMSNorm of each head's queries and keys.
    const float *q_norm_weight, *k_norm_weight;
    // qkv: queries, keys and values, one below the other. A gated mlp_up alternates 16 outputs of the gate and 16 of up.
    Weights qkv, attn_out, mlp_up, mlp_down;
};

struct Model {
    int32_t num_layers, hidden_size, num_heads, heads_per_kv, head_dim, intermediate_size, gated, vocab_size;
    float epsilon;
    // With tied embeddings both are the same.
    Weights token_embedding, lm_head;
    // Learned positions [positions][hidden_size], or RoPE's frequencies [head_dim / 2].
    const float *position_embedding, *inv_freq;
    const float *final_norm_weight, *final_norm_bias;
    const Layer* layer;
};
