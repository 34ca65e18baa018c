"""Families with LayerNorm, or with learned positions or ALiBi."""

from __future__ import annotations

from typing import Any

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# A head of 24 is padded to 32, an inner size of 88 to 96.
_WIDE = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
# Heads of 32: norms of heads are not padded.
_STABLELM = {**_WIDE, "num_attention_heads": 3, "num_key_value_heads": 3}
_FALCON = {**_SIZES, "bias": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "bloom six heads and normed residuals": {
        "hidden_size": 96, "n_layer": 2, "n_head": 6, "apply_residual_connection_post_layernorm": True,
        "tie_word_embeddings": False,
    },
    # More heads for a KV head than attention computes together, and a number of them that has no divisors.
    "falcon": {
        **_SIZES, "hidden_size": 544, "num_attention_heads": 17, "ffn_hidden_size": 88, "rope_theta": 500.0,
        "initializer_range": 0.1,
    },
    "falcon two norms": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    "falcon one norm": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon alibi": {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False},
    "falcon sequential": {**_FALCON, "parallel_attn": False, "activation": "gelu_pytorch_tanh"},
    "gpt2": _GPT,
    "gpt_bigcode": {**_GPT, "n_embd": 96, "n_head": 24, "n_inner": 88},
    "gpt_bigcode all heads": {**_GPT, "multi_query": False, "scale_attn_weights": False, "tie_word_embeddings": False},
    "gpt_neo": {
        "hidden_size": 64, "num_layers": 3, "num_heads": 4, "window_size": 12,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
    },
    "gpt_neo global": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
        "intermediate_size": 88, "tie_word_embeddings": False,
    },
    "gpt_neox": _WIDE,
    "gpt_neox sequential": {
        **_WIDE, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True,
        "rotary_pct": 1.0, "rotary_emb_base": 500, "hidden_act": "gelu_fast",
    },
    "gptj": {**_GPT, "rotary_dim": 12},
    # With the other entries' weights, the scores of wide models are so large that transformers' own float32 is inexact.
    "gptj wide heads": {
        "n_embd": 320, "n_layer": 2, "n_head": 2, "n_inner": 88, "rotary_dim": 160, "initializer_range": 0.1,
    },
    "opt": {**_SIZES, "ffn_dim": 88},
    "opt norms after": {**_SIZES, "ffn_dim": 128, "do_layer_norm_before": False, "word_embed_proj_dim": 48},
    "opt projected": {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 48, "tie_word_embeddings": False},
    "opt without biases": {
        **_SIZES, "ffn_dim": 128, "enable_bias": False, "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    "opt without final norm": {**_SIZES, "ffn_dim": 128, "_remove_final_layer_norm": True},
    "nemotron": {**_WIDE, "num_key_value_heads": 2},
    "nemotron biases": {**_WIDE, "head_dim": 32, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
                        "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    "phi": {**_WIDE, "partial_rotary_factor": 0.25},
    "phi normed heads": {**_WIDE, "num_attention_heads": 3, "qk_layernorm": True, "num_key_value_heads": 1},
    # Attention's outputs are no multiple of the inputs that the kernels multiply at a time: 3 heads of 80.
    "phi odd heads": {**_WIDE, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80},
    "stablelm": {**_STABLELM, "num_attention_heads": 6},
    "stablelm parallel": {
        **_STABLELM, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True,
        "tie_word_embeddings": True, "partial_rotary_factor": 0.5,
    },
    "starcoder2": {**_WIDE, "num_key_value_heads": 2, "sliding_window": 12, "rope_theta": 500.0},
    "starcoder2 without biases": {**_WIDE, "use_bias": False, "tie_word_embeddings": False, "num_key_value_heads": 1},
}  # fmt: skip
