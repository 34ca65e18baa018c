"""Families with RMSNorm and a gated MLP, and those close to them."""

from __future__ import annotations

from typing import Any

# A head of 24 is padded to 32, an inner size of 88 to 96.
_SIZES = {
    "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip
_SMALL_HEADS = {**_SIZES, "hidden_size": 96, "num_key_value_heads": None, "pad_token_id": 0}
_SMALL_HEADS.pop("head_dim")
_BIASES = {"attention_bias": True, "mlp_bias": True}
_SLIDING_FIRST = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
_LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
_YARN_SETTINGS = {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False}
_FACTORS = {"short_factor": [1.0 + n / 8 for n in range(12)], "long_factor": [2.0 + n / 2 for n in range(12)]}
_SHORT = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, **_FACTORS}
# All texts are longer than this context, but for one of a single token, at position 0.
_LONG = {**_SHORT, "original_max_position_embeddings": 1, "attention_factor": 1.3}
# The factors of three quarters of a head.
_PHI3_LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "attention_factor": 1.3, "partial_rotary_factor": 0.75,
    **{name: factors[:9] for name, factors in _FACTORS.items()},
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "llama biases": {**_SIZES, **_BIASES, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama linear": {**_SIZES, "rope_parameters": _LINEAR},
    "llama dynamic": {**_SIZES, "rope_parameters": {**_LINEAR, "rope_type": "dynamic"}},
    "llama llama3": {**_SIZES, "rope_parameters": _LLAMA3},
    "llama yarn": {**_SIZES, "rope_parameters": _YARN},
    "llama yarn settings": {**_SIZES, "rope_parameters": {**_YARN, **_YARN_SETTINGS}},
    "llama longrope short": {**_SIZES, "rope_parameters": _SHORT},
    "llama longrope long": {**_SIZES, "rope_parameters": _LONG},
    "mistral": {**_SIZES, "sliding_window": 12},
    "qwen2": {**_SIZES, "tie_word_embeddings": True},
    "qwen2 windows": {**_SIZES, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": _SIZES,
    "gemma": {**_SIZES, "hidden_act": "gelu"},
    "gemma wide": {**_SIZES, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": False,
                   "attention_bias": True},
    "gemma2": {**_SIZES, "query_pre_attn_scalar": 40, "sliding_window": 12, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 2.0},
    "gemma2 uncapped": {**_SIZES, **_SLIDING_FIRST, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                        "hidden_activation": "silu"},
    "gemma3_text": {**_SIZES, **_SLIDING_FIRST, "query_pre_attn_scalar": 40, "rope_parameters": {
        "full_attention": _LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    "gemma3_text capped": {**_SIZES, "num_hidden_layers": 3, "sliding_window_pattern": 3, "sliding_window": 5,
                           "final_logit_softcapping": 2.0},
    "phi3": {**_SMALL_HEADS, "sliding_window": 12},
    "phi3 short": {**_SMALL_HEADS, "num_key_value_heads": 2, "rope_parameters": {
        **_SHORT, "factor": None}, "original_max_position_embeddings": 96, "tie_word_embeddings": True},
    "phi3 long": {**_SMALL_HEADS, "rope_parameters": _PHI3_LONG, "original_max_position_embeddings": 1},
    "olmo": {**_SIZES, "clip_qkv": 1.0, "attention_bias": True},
    "olmo unclipped": {**_SMALL_HEADS, "tie_word_embeddings": True},
    "olmo2": _SIZES,
    "olmo2 biases": {**_SMALL_HEADS, "attention_bias": True, "tie_word_embeddings": True},
    "olmo3": {**_SIZES, **_SLIDING_FIRST, "rope_parameters": {
        "full_attention": _YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
    "exaone4": {**_SIZES, "layer_types": ["full_attention"] * 2, "sliding_window": None, "tie_word_embeddings": True},
    "exaone4 windows": {**_SIZES, **_SLIDING_FIRST},
    "ernie4_5": {**_SIZES, "pad_token_id": 0},
    "ernie4_5 biases": {**_SIZES, "use_bias": True, "tie_word_embeddings": False, "pad_token_id": 0},
    "glm": {**_SIZES, "pad_token_id": 0},
    "glm4": {**_SIZES, "attention_bias": False, "tie_word_embeddings": True, "pad_token_id": 0},
    "hunyuan_v1_dense": {**_SIZES, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0}},
    "hunyuan_v1_dense biases": {**_SIZES, "attention_bias": True, "tie_word_embeddings": True},
    "arcee": _SIZES,
    "ministral": {**_SIZES, **_SLIDING_FIRST},
    "smollm3": {**_SIZES, "num_hidden_layers": 4, "pad_token_id": 0},
    "smollm3 windows": {**_SIZES, **_BIASES, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 12,
                        "tie_word_embeddings": False, "pad_token_id": 0},
    "granite": {**_SIZES, "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.4,
                "logits_scaling": 2.0},
    "granite biases": {**_SMALL_HEADS, **_BIASES, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
                       "tie_word_embeddings": True},
    "cohere": {**_SIZES, "logit_scale": 0.5, "attention_bias": True},
    "cohere2": {**_SIZES, "num_hidden_layers": 3, "head_dim": 16, "sliding_window_pattern": 3, "sliding_window": 12,
                "logit_scale": 0.5, "attention_bias": True},
    "cohere head norms": {**_SIZES, "head_dim": 32, "use_qk_norm": True, "tie_word_embeddings": False},
    "cohere one key": {**_SIZES, "head_dim": 32, "use_qk_norm": True, "num_key_value_heads": 1},
}  # fmt: skip
