"""What an architecture's module says of it, and what several share. This module knows no architecture by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model_file import ModelFile
from ..rope import rope_parameters
from . import rules
from .rules import Rule

Config = dict[str, Any]
# Hugging Face's name of a tensor, without .weight or .bias; with the rule that makes it, if it is not stored as it is.
Names = Mapping[str, "str | tuple[str, Rule]"]


@dataclass(frozen=True)
class Architecture:
    """`names` are of tensors outside layers; `layer_names` are of those in layer N, which follow `layers`.N."""

    config: Callable[[ModelFile], Config]
    names: Names
    layer_names: Names
    layers: str = "model.layers"
    # Further names, where they depend on the file.
    more: Callable[[ModelFile], Names] = field(default=lambda _: {})


NAMES: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYER_NAMES: Names = {
    "attn_norm": "input_layernorm", "attn_q": _ATTENTION[0], "attn_k": _ATTENTION[1], "attn_v": _ATTENTION[2],
    "attn_qkv": ("", rules.split_qkv(*_ATTENTION)), "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEAD_NORMS: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Where the file has the halves of heads in pairs, as Llama's does.
PAIRED: Names = {
    "attn_q": (_ATTENTION[0], rules.query_pairs), "attn_k": (_ATTENTION[1], rules.key_pairs),
    "attn_qkv": ("", rules.split_qkv(*_ATTENTION, pairs=True)),
}  # fmt: skip
EXPERTS: Names = {
    "ffn_gate_exps": ("mlp.experts", rules.experts("gate_proj")),
    "ffn_up_exps": ("mlp.experts", rules.experts("up_proj")),
    "ffn_down_exps": ("mlp.experts", rules.experts("down_proj")),
    "ffn_gate_up_exps": ("mlp.experts", rules.gate_and_up_experts("gate_proj", "up_proj")),
}  # fmt: skip


def head_dim(file: ModelFile) -> int:
    whole = file.size("embedding_length") // file.size("attention.head_count")
    dim = file.size("attention.key_length", whole)
    if file.size("attention.value_length", dim) != dim:
        raise file.error("its keys and values have different sizes")
    return dim


def vocab_size(file: ModelFile) -> int:
    """The rows of the embedding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.error("it has no tensor token_embd.weight of two dimensions")
    return embedding.shape[0]


def is_tied(file: ModelFile) -> bool:
    return "output.weight" not in file.tensors


def has_tensor(file: ModelFile, name: str) -> bool:
    """Whether some layer has it."""
    return any(tensor.startswith("blk.") and tensor.split(".", 2)[-1] == name for tensor in file.tensors)


def norm_epsilon(file: ModelFile, kind: str = "layer_norm_rms_epsilon") -> float:
    return file.number(f"attention.{kind}")


def partial_rotary(file: ModelFile, dim: int, default: int | None = None) -> float:
    """The part of a head that rotates; int(dim * part) gives the count back."""
    count = file.size("rope.dimension_count", default or dim)
    part = count / dim
    return part if int(dim * part) == count else math.nextafter(part, 2.0)


def layer_types(file: ModelFile, pattern: int) -> list[str]:
    """Of each layer; a file that does not say it has every `pattern`-th without a window."""
    layers, written = file.size("block_count"), file.value("attention.sliding_window_pattern")
    if isinstance(written, list) and len(written) == layers:
        slides = [bool(entry) for entry in written]
    else:
        every = file.size("attention.sliding_window_pattern", pattern)
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def decoder(file: ModelFile, model_type: str, **values: Any) -> Config:
    """config.json of an architecture close to Llama."""
    heads, dim = file.size("attention.head_count"), head_dim(file)
    return {
        "model_type": model_type, "hidden_size": file.size("embedding_length"), "vocab_size": vocab_size(file),
        "num_hidden_layers": file.size("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": file.size("attention.head_count_kv", heads), "head_dim": dim,
        "max_position_embeddings": file.size("context_length"), "hidden_act": "silu",
        "tie_word_embeddings": is_tied(file), "rope_parameters": rope_parameters(file), **values,
    }  # fmt: skip


def rms_decoder(file: ModelFile, model_type: str, **values: Any) -> Config:
    sizes = {"intermediate_size": file.size("feed_forward_length"), "rms_norm_eps": norm_epsilon(file)}
    return decoder(file, model_type, **(sizes | values))
