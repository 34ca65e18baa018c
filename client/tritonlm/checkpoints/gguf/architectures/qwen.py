"""Qwen 2 and 3, with and without mixtures of experts, and gpt-oss."""

from __future__ import annotations

from ..model_file import ModelFile
from ..rope import rope_parameters
from . import rules
from .architecture import EXPERTS, HEAD_NORMS, LAYER_NAMES, NAMES, Architecture, Config, Names, has_tensor, rms_decoder

_ROUTER: Names = {**EXPERTS, "ffn_gate_inp": "mlp.gate"}
_SHARED_EXPERT: Names = {
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate", rules.as_row), "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_GPT_OSS: Names = {
    **LAYER_NAMES, **EXPERTS, "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router",
    "attn_sinks": ("self_attn.sinks", rules.without_suffix),
}  # fmt: skip


def _qwen2(file: ModelFile) -> Config:
    return rms_decoder(file, "qwen2", use_sliding_window=False)


def _qwen3(file: ModelFile) -> Config:
    return rms_decoder(file, "qwen3", use_sliding_window=False, attention_bias=has_tensor(file, "attn_q.bias"))


def _qwen2_moe(file: ModelFile) -> Config:
    shared = _rows(file, "ffn_gate_shexp.weight", 0)
    return _mixture(file, "qwen2_moe", norm_topk_prob=False, shared_expert_intermediate_size=shared)


def _qwen3_moe(file: ModelFile) -> Config:
    return _mixture(file, "qwen3_moe", norm_topk_prob=True)


def _mixture(file: ModelFile, model_type: str, **values: object) -> Config:
    is_fused = has_tensor(file, "ffn_gate_up_exps.weight")
    inner = _rows(file, "ffn_gate_up_exps.weight", 1) // 2 if is_fused else _rows(file, "ffn_gate_exps.weight", 1)
    return rms_decoder(
        file, model_type, num_experts=file.size("expert_count"), num_experts_per_tok=file.size("expert_used_count"),
        moe_intermediate_size=inner, intermediate_size=file.size("feed_forward_length", inner), decoder_sparse_step=1,
        mlp_only_layers=[], use_sliding_window=False, **values,
    )  # fmt: skip


def _gpt_oss(file: ModelFile) -> Config:
    # truncate: the model's own code does not round the dimensions between which it interpolates.
    rope = rope_parameters(file, 150000.0) | {"truncate": False}
    return rms_decoder(
        file, "gpt_oss", rope_parameters=rope, num_local_experts=file.size("expert_count"),
        num_experts_per_tok=file.size("expert_used_count"), sliding_window=file.size("attention.sliding_window", 128),
        intermediate_size=file.size("expert_feed_forward_length"),
    )  # fmt: skip


def _rows(file: ModelFile, name: str, dimension: int) -> int:
    """A size of the first layer's tensor of this name."""
    for layer in range(file.size("block_count")):
        tensor = file.tensors.get(f"blk.{layer}.{name}")
        if tensor is not None and len(tensor.shape) > dimension:
            return tensor.shape[dimension]
    raise file.error(f"it has no tensor {name}")


ARCHITECTURES = {
    "qwen2": Architecture(_qwen2, NAMES, LAYER_NAMES),
    "qwen3": Architecture(_qwen3, NAMES, {**LAYER_NAMES, **HEAD_NORMS}),
    "qwen2moe": Architecture(_qwen2_moe, NAMES, {**LAYER_NAMES, **_ROUTER, **_SHARED_EXPERT}),
    "qwen3moe": Architecture(_qwen3_moe, NAMES, {**LAYER_NAMES, **HEAD_NORMS, **_ROUTER}),
    "gpt-oss": Architecture(_gpt_oss, NAMES, _GPT_OSS),
}
