"""GPT-2 and others with LayerNorm: GPT-NeoX, BLOOM, Falcon, StarCoder 1 and 2, Phi 2, StableLM; and Phi 3."""

from __future__ import annotations

from collections.abc import Iterator

from ..model_file import ModelFile
from . import rules
from .architecture import (
    LAYER_NAMES,
    NAMES,
    Architecture,
    Config,
    Names,
    decoder,
    has_tensor,
    head_dim,
    is_tied,
    norm_epsilon,
    partial_rotary,
    rms_decoder,
    vocab_size,
)

_EPSILON = "layer_norm_epsilon"


def _gpt2(file: ModelFile) -> Config:
    return {**_old(file, "gpt2"), "n_inner": file.size("feed_forward_length"), "tie_word_embeddings": True}


def _starcoder(file: ModelFile) -> Config:
    is_multi_query = file.size("attention.head_count_kv", 1) == 1
    inner = file.size("feed_forward_length")
    return {**_old(file, "gpt_bigcode"), "n_inner": inner, "multi_query": is_multi_query}


def _old(file: ModelFile, model_type: str) -> Config:
    return {
        "model_type": model_type, "n_embd": file.size("embedding_length"), "n_layer": file.size("block_count"),
        "n_head": file.size("attention.head_count"), "n_positions": file.size("context_length"),
        "vocab_size": vocab_size(file), "layer_norm_epsilon": norm_epsilon(file, _EPSILON),
        "tie_word_embeddings": is_tied(file), "activation_function": "gelu_pytorch_tanh",
    }  # fmt: skip


def _gpt2_names(file: ModelFile) -> Names:
    """The matrix of the logits, where a file has one, is the embedding, often in a better type."""
    return {} if is_tied(file) else {"output": "transformer.wte", "token_embd": ("", _nothing)}


def _nothing(_: rules.Source) -> Iterator[rules.Piece]:
    return iter(())


def _bloom(file: ModelFile) -> Config:
    return {
        "model_type": "bloom", "hidden_size": file.size("embedding_length"), "n_layer": file.size("block_count"),
        "n_head": file.size("attention.head_count"), "vocab_size": vocab_size(file),
        "seq_length": file.size("context_length"), "layer_norm_epsilon": norm_epsilon(file, _EPSILON),
        "tie_word_embeddings": is_tied(file),
    }  # fmt: skip


def _gpt_neox(file: ModelFile) -> Config:
    dim = head_dim(file)
    return decoder(
        file, "gpt_neox", intermediate_size=file.size("feed_forward_length"), rotary_pct=partial_rotary(file, dim),
        layer_norm_eps=norm_epsilon(file, _EPSILON), hidden_act="gelu",
        use_parallel_residual=file.flag("use_parallel_residual", True),
    )  # fmt: skip


def _falcon(file: ModelFile) -> Config:
    heads = file.size("attention.head_count")
    kv_heads = file.size("attention.head_count_kv", 1)
    is_new = has_tensor(file, "attn_norm_2.weight")
    if not is_new and kv_heads not in (1, heads):
        raise file.error(f"its {heads} heads share {kv_heads} keys, and it has one norm in each layer")
    return decoder(
        file, "falcon", layer_norm_epsilon=norm_epsilon(file, _EPSILON), num_kv_heads=kv_heads, activation="gelu",
        new_decoder_architecture=is_new, multi_query=kv_heads == 1, parallel_attn=True, alibi=False,
        ffn_hidden_size=file.size("feed_forward_length"), bias=has_tensor(file, "attn_qkv.bias"),
    )  # fmt: skip


def _falcon_names(file: ModelFile) -> Names:
    """With two norms, the format calls attention's the second."""
    return {} if not has_tensor(file, "attn_norm_2.weight") else {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}


def _starcoder2(file: ModelFile) -> Config:
    return decoder(
        file, "starcoder2", intermediate_size=file.size("feed_forward_length"), sliding_window=None,
        norm_epsilon=norm_epsilon(file, _EPSILON), hidden_act="gelu_pytorch_tanh",
        use_bias=has_tensor(file, "attn_q.bias"),
    )  # fmt: skip


def _phi(file: ModelFile) -> Config:
    return decoder(
        file, "phi", intermediate_size=file.size("feed_forward_length"), layer_norm_eps=norm_epsilon(file, _EPSILON),
        partial_rotary_factor=partial_rotary(file, head_dim(file)), hidden_act="gelu_new",
    )  # fmt: skip


def _phi3(file: ModelFile) -> Config:
    dim, context = head_dim(file), file.size("context_length")
    return rms_decoder(
        file, "phi3", sliding_window=file.window(), partial_rotary_factor=partial_rotary(file, dim),
        original_max_position_embeddings=file.size("rope.scaling.original_context_length", context),
    )  # fmt: skip


def _stablelm(file: ModelFile) -> Config:
    return decoder(
        file, "stablelm", intermediate_size=file.size("feed_forward_length"),
        layer_norm_eps=norm_epsilon(file, _EPSILON), partial_rotary_factor=partial_rotary(file, head_dim(file)),
        use_parallel_residual=not has_tensor(file, "ffn_norm.weight"), use_qkv_bias=has_tensor(file, "attn_q.bias"),
        qk_layernorm=has_tensor(file, "attn_q_norm.weight"),
    )  # fmt: skip


_TRANSFORMER: Names = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOOM: Names = {**_TRANSFORMER, "token_embd_norm": "transformer.word_embeddings_layernorm"}
_GPT: Names = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
}  # fmt: skip
_GPT_LAYER: Names = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
# GPT-2's code has the matrices (inputs, outputs).
_GPT2_LAYER: Names = {
    key: name if key.endswith("norm") else (str(name), rules.transposed) for key, name in _GPT_LAYER.items()
}
_FOUR_H: Names = {
    "attn_norm": "input_layernorm", "attn_output": "self_attention.dense", "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_NEOX_LAYER: Names = {
    **_FOUR_H, "attn_qkv": ("attention.query_key_value", rules.heads_of_qkv), "attn_output": "attention.dense",
}  # fmt: skip
_NEOX: Names = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
_BLOOM_LAYER: Names = {**_FOUR_H, "attn_qkv": ("self_attention.query_key_value", rules.heads_of_qkv)}
_FALCON_LAYER: Names = {**_FOUR_H, "attn_qkv": ("self_attention.query_key_value", rules.kv_heads_of_qkv)}
_PHI_LAYER: Names = {**LAYER_NAMES, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_PHI3_LAYER: Names = {**LAYER_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_STABLELM_LAYER: Names = {
    **LAYER_NAMES, "attn_q_norm": ("self_attn.q_layernorm.norms", rules.head_norms),
    "attn_k_norm": ("self_attn.k_layernorm.norms", rules.head_norms),
}  # fmt: skip

ARCHITECTURES = {
    "gpt2": Architecture(_gpt2, _GPT, _GPT2_LAYER, "transformer.h", _gpt2_names),
    "starcoder": Architecture(_starcoder, _GPT, _GPT_LAYER, "transformer.h"),
    "gptneox": Architecture(_gpt_neox, _NEOX, _NEOX_LAYER, "gpt_neox.layers"),
    "bloom": Architecture(_bloom, _BLOOM, _BLOOM_LAYER, "transformer.h"),
    "falcon": Architecture(_falcon, _TRANSFORMER, _FALCON_LAYER, "transformer.h", _falcon_names),
    "starcoder2": Architecture(_starcoder2, NAMES, {**LAYER_NAMES, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "phi2": Architecture(_phi, {**NAMES, "output_norm": "model.final_layernorm"}, _PHI_LAYER),
    "phi3": Architecture(_phi3, NAMES, _PHI3_LAYER),
    "stablelm": Architecture(_stablelm, NAMES, _STABLELM_LAYER),
}  # fmt: skip
