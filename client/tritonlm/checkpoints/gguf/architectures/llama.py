"""Llama and what is close to it: Mistral, Mixtral (both under Llama's name), SmolLM 3, Granite, Command R, OLMo."""

from __future__ import annotations

from ..model_file import ModelFile
from . import rules
from .architecture import (
    EXPERTS,
    HEAD_NORMS,
    LAYER_NAMES,
    NAMES,
    PAIRED,
    Architecture,
    Config,
    Names,
    decoder,
    has_tensor,
    head_dim,
    norm_epsilon,
    rms_decoder,
)

_MIXTRAL_EXPERTS: Names = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": ("block_sparse_moe.experts", rules.experts("w1")),
    "ffn_up_exps": ("block_sparse_moe.experts", rules.experts("w3")),
    "ffn_down_exps": ("block_sparse_moe.experts", rules.experts("w2")),
    "ffn_gate_up_exps": ("block_sparse_moe.experts", rules.gate_and_up_experts("w1", "w3")),
}  # fmt: skip


def _llama(file: ModelFile) -> Config:
    if file.size("rope.dimension_count", head_dim(file)) != head_dim(file):
        raise file.error("its RoPE rotates a part of each head")
    if file.value("expert_count"):
        sizes = {"num_local_experts": file.size("expert_count"), "num_experts_per_tok": file.size("expert_used_count")}
        return rms_decoder(file, "mixtral", sliding_window=None, **sizes)
    biases = {"attention_bias": has_tensor(file, "attn_q.bias"), "mlp_bias": has_tensor(file, "ffn_up.bias")}
    return rms_decoder(file, "llama", **biases)


def _llama_names(file: ModelFile) -> Names:
    return _MIXTRAL_EXPERTS if file.value("expert_count") else {}


def _smollm3(file: ModelFile) -> Config:
    # The format does not say which layers rotate; all published models leave out every fourth.
    return rms_decoder(file, "smollm3", no_rope_layer_interval=4, use_sliding_window=False)


def _granite(file: ModelFile) -> Config:
    if file.value("rope.scaling.finetuned") is False:
        raise file.error("its layers have no positions")
    return rms_decoder(
        file, "granite", embedding_multiplier=file.number("embedding_scale", 1.0),
        residual_multiplier=file.number("residual_scale", 1.0), logits_scaling=file.number("logit_scale", 1.0),
        attention_multiplier=file.number("attention.scale", head_dim(file) ** -0.5),
    )  # fmt: skip


def _cohere(file: ModelFile) -> Config:
    return decoder(
        file, "cohere", intermediate_size=file.size("feed_forward_length"),
        layer_norm_eps=norm_epsilon(file, "layer_norm_epsilon"), logit_scale=file.number("logit_scale", 1.0),
        use_qk_norm=has_tensor(file, "attn_q_norm.weight"),
    )  # fmt: skip


def _olmo(file: ModelFile) -> Config:
    clip = file.optional("attention.clamp_kqv")
    return decoder(file, "olmo", intermediate_size=file.size("feed_forward_length"), clip_qkv=clip)


def _olmo2(file: ModelFile) -> Config:
    if file.window():
        raise file.error("its architecture is OLMo 3, with sliding windows")
    return rms_decoder(file, "olmo2")


def _olmoe(file: ModelFile) -> Config:
    sizes = {"num_experts": file.size("expert_count"), "num_experts_per_tok": file.size("expert_used_count")}
    clip = file.optional("attention.clamp_kqv")
    return rms_decoder(file, "olmoe", norm_topk_prob=False, clip_qkv=clip, **sizes)


_OLMO2_NAMES: Names = {
    **LAYER_NAMES, **HEAD_NORMS, "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip

ARCHITECTURES = {
    "llama": Architecture(_llama, NAMES, {**LAYER_NAMES, **PAIRED}, more=_llama_names),
    "smollm3": Architecture(_smollm3, NAMES, {**LAYER_NAMES, **PAIRED}),
    "granite": Architecture(_granite, NAMES, {**LAYER_NAMES, **PAIRED}),
    "command-r": Architecture(_cohere, NAMES, {**LAYER_NAMES, **HEAD_NORMS}),
    "olmo": Architecture(_olmo, NAMES, {**LAYER_NAMES, **PAIRED}),
    "olmo2": Architecture(_olmo2, NAMES, _OLMO2_NAMES),
    "olmoe": Architecture(_olmoe, NAMES, {**LAYER_NAMES, **HEAD_NORMS, **EXPERTS, "ffn_gate_inp": "mlp.gate"}),
}  # fmt: skip
