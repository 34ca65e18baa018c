"""The kernels' structures, field by field as in model.hpp, step.hpp, sample.hpp and score.hpp."""

from __future__ import annotations

import ctypes

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Weights(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("values", "scales", "bias", "outliers", "outlier_offsets")),
        ("max_exponent", INT),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("attn_norm_weight", "attn_norm_bias", "mlp_norm_weight", "mlp_norm_bias")),
        *((name, POINTER) for name in ("q_norm_weight", "k_norm_weight")),
        *((name, Weights) for name in ("qkv", "attn_out", "mlp_up", "mlp_down")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("num_layers", "hidden_size", "num_heads", "heads_per_kv", "head_dim")),
        *((name, INT) for name in ("intermediate_size", "gated", "vocab_size")),
        ("epsilon", FLOAT),
        *((name, Weights) for name in ("token_embedding", "lm_head")),
        *((name, POINTER) for name in ("position_embedding", "inv_freq")),
        *((name, POINTER) for name in ("final_norm_weight", "final_norm_bias", "layer")),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "logit_count", "hidden_count")),
        *((name, INT) for name in ("table_width", "block_tokens", "logit_stride")),
        *((name, POINTER) for name in ("ids", "positions", "sequences", "logit_rows", "hidden_rows", "block_tables")),
        *((name, POINTER) for name in ("keys", "values", "logits", "hidden", "max_logits", "argmax_ids")),
        *((name, POINTER) for name in ("stage_seconds", "progress")),
    ]


class Project(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "logit_stride")),
        *((name, POINTER) for name in ("hidden", "hidden_rows", "logits", "stage_seconds", "progress")),
    ]


class Sample(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "vocab_size", "logit_stride")),
        *((name, POINTER) for name in ("logits", "row_indices")),
        *((name, POINTER) for name in ("temperatures", "top_k", "top_p_tail", "min_p", "uniforms", "ids")),
    ]


class Score(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "vocab_size", "logit_stride", "alternatives")),
        *((name, POINTER) for name in ("logits", "row_indices", "ids", "finite", "token_logprobs")),
        *((name, POINTER) for name in ("top_ids", "top_logprobs")),
    ]
