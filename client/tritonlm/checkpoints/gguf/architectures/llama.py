"""Llama and what is close to it: Mistral, Mixtral (both under Llama's name), SmolLM 3, Granite, Command R, OLMo, Arcee,
ERNIE 4.5, EXAONE 4, GLM 4, Hunyuan and Nemotron.
"""

from __future__ import annotations

from ..model_file import ModelFile
from ..rope import rope_parameters
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
    layer_types,
    norm_epsilon,
    partial_rotary,
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


def _cohere2(file: ModelFile) -> Config:
    if file.size("rope.dimension_count", head_dim(file)) != head_dim(file):
        raise file.error("its RoPE rotates a part of each head")
    return decoder(
        file, "cohere2", intermediate_size=file.size("feed_forward_length"),
        layer_norm_eps=norm_epsilon(file, "layer_norm_epsilon"), logit_scale=file.number("logit_scale", 1.0),
        sliding_window=file.window(), layer_types=layer_types(file, 4),
    )  # fmt: skip


def _arcee(file: ModelFile) -> Config:
    return rms_decoder(file, "arcee", hidden_act="relu2")


def _ernie(file: ModelFile) -> Config:
    return rms_decoder(file, "ernie4_5", use_bias=has_tensor(file, "ffn_up.bias"))


def _exaone4(file: ModelFile) -> Config:
    window = file.window()
    types = layer_types(file, 4) if window else ["full_attention"] * file.size("block_count")
    return rms_decoder(file, "exaone4", sliding_window=window, layer_types=types)


def _glm4(file: ModelFile) -> Config:
    if file.value("rope.dimension_sections"):
        raise file.error("its RoPE has sections for images")
    rope = rope_parameters(file) | {"partial_rotary_factor": partial_rotary(file, head_dim(file))}
    return rms_decoder(file, "glm4", rope_parameters=rope, attention_bias=has_tensor(file, "attn_q.bias"))


def _hunyuan(file: ModelFile) -> Config:
    # The file's base is stretched already.
    return rms_decoder(file, "hunyuan_v1_dense", attention_bias=has_tensor(file, "attn_q.bias"))


def _nemotron(file: ModelFile) -> Config:
    rope = rope_parameters(file) | {"partial_rotary_factor": partial_rotary(file, head_dim(file))}
    return decoder(
        file, "nemotron", hidden_act="relu2", intermediate_size=file.size("feed_forward_length"), rope_parameters=rope,
        norm_eps=norm_epsilon(file, "layer_norm_epsilon"), attention_bias=has_tensor(file, "attn_q.bias"),
        mlp_bias=has_tensor(file, "ffn_up.bias"),
    )  # fmt: skip


def _olmo(file: ModelFile) -> Config:
    clip = file.optional("attention.clamp_kqv")
    return decoder(file, "olmo", intermediate_size=file.size("feed_forward_length"), clip_qkv=clip)


def _olmo2(file: ModelFile) -> Config:
    if not (window := file.window()):
        return rms_decoder(file, "olmo2")
    # OLMo 3 has the same name. The rotation of its sliding windows is not scaled.
    full = rope_parameters(file)
    theta = file.number("rope.freq_base_swa", full["rope_theta"])
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    types = layer_types(file, 4)
    return rms_decoder(file, "olmo3", sliding_window=window, layer_types=types, rope_parameters=rope)


def _olmoe(file: ModelFile) -> Config:
    sizes = {"num_experts": file.size("expert_count"), "num_experts_per_tok": file.size("expert_used_count")}
    clip = file.optional("attention.clamp_kqv")
    return rms_decoder(file, "olmoe", norm_topk_prob=False, clip_qkv=clip, **sizes)


_OLMO2_NAMES: Names = {
    **LAYER_NAMES, **HEAD_NORMS, "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_GLM_NAMES: Names = {
    **LAYER_NAMES, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}  # fmt: skip
_NORMS_PLUS_ONE: Names = {
    "attn_norm": ("input_layernorm", rules.minus_one), "ffn_norm": ("post_attention_layernorm", rules.minus_one),
}  # fmt: skip

ARCHITECTURES = {
    "llama": Architecture(_llama, NAMES, {**LAYER_NAMES, **PAIRED}, more=_llama_names),
    "smollm3": Architecture(_smollm3, NAMES, {**LAYER_NAMES, **PAIRED}),
    "granite": Architecture(_granite, NAMES, {**LAYER_NAMES, **PAIRED}),
    "command-r": Architecture(_cohere, NAMES, {**LAYER_NAMES, **HEAD_NORMS}),
    "cohere2": Architecture(_cohere2, NAMES, LAYER_NAMES),
    "arcee": Architecture(_arcee, NAMES, {**LAYER_NAMES, **PAIRED}),
    "ernie4_5": Architecture(_ernie, NAMES, LAYER_NAMES),
    "exaone4": Architecture(_exaone4, NAMES, _OLMO2_NAMES),
    "glm4": Architecture(_glm4, NAMES, _GLM_NAMES),
    "hunyuan-dense": Architecture(
        _hunyuan, NAMES,
        {**LAYER_NAMES, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "nemotron": Architecture(
        _nemotron, {**NAMES, "output_norm": ("model.norm", rules.minus_one)}, {**LAYER_NAMES, **_NORMS_PLUS_ONE}
    ),
    "olmo": Architecture(_olmo, NAMES, {**LAYER_NAMES, **PAIRED}),
    "olmo2": Architecture(_olmo2, NAMES, _OLMO2_NAMES),
    "olmoe": Architecture(_olmoe, NAMES, {**LAYER_NAMES, **HEAD_NORMS, **EXPERTS, "ffn_gate_inp": "mlp.gate"}),
}  # fmt: skip
