"""Families with mixtures of experts."""

from __future__ import annotations

from typing import Any

# A head of 24 is padded to 32, an inner size of 88 to 96.
_SIZES = {
    "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
_QWEN = {**_SIZES, "num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 40}
_SHARED = {**_QWEN, "shared_expert_intermediate_size": 72}

_GRANITE = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.4, "logits_scaling": 2.0,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_SIZES, "num_local_experts": 5},
    "mixtral window": {
        **_SIZES, "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 24, "sliding_window": 12,
    },
    "granitemoe": {**_SIZES, **_GRANITE, "num_local_experts": 5},
    "granitemoeshared": {**_SIZES, "num_local_experts": 3, "shared_intermediate_size": 40, "residual_multiplier": 0.4},
    "granitemoehybrid": {
        **_SIZES, **_GRANITE, "num_local_experts": 0, "shared_intermediate_size": 88, "mamba_n_heads": 8,
        "layer_types": ["attention"] * 2, "position_embedding_type": "rope",
    },
    "granitemoehybrid without positions": {
        **_SIZES, "num_local_experts": 4, "shared_intermediate_size": 40, "mamba_n_heads": 8, "attention_bias": True,
        "layer_types": ["attention"] * 2, "tie_word_embeddings": True, "attention_multiplier": 0.2,
    },
    "olmoe": {**_SIZES, "num_experts": 20, "num_experts_per_tok": 3},
    "olmoe renormalized": {**_SIZES, "num_experts": 4, "norm_topk_prob": True, "attention_bias": True},
    "qwen2_moe": _SHARED,
    "qwen2_moe mixed": {
        **_SHARED, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": True,
        "sliding_window": 12, "max_window_layers": 1, "tie_word_embeddings": True,
    },
    "qwen3_moe": {**_QWEN, "head_dim": 24, "mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3_moe window": {**_QWEN, "attention_bias": True, "use_sliding_window": True, "sliding_window": 12},
    # Wide weights, so that gates and ups are clamped.
    "gpt_oss": {
        **_SIZES, "head_dim": 24, "num_local_experts": 5, "sliding_window": 12, "initializer_range": 0.3,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "truncate": False, "beta_fast": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
}  # fmt: skip
