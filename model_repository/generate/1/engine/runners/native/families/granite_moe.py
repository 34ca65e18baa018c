"""Granite with mixtures of experts, an MLP beside them, or that MLP alone, as the small models of Granite 4 have it.

The best experts are chosen before the softmax. In granitemoehybrid layers may be Mamba's, which no kernel computes, and
RoPE may be missing.
"""

from __future__ import annotations

from ..family_config import FULL, FamilyConfig
from ..linear import Experts, Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..unsupported import Unsupported
from ..weights import WeightPacker

MODEL_TYPES = ("granitemoe", "granitemoeshared", "granitemoehybrid")
PREFIX = "model."
_STACKS = ("input_linear.weight", "output_linear.weight")


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim, is_hybrid = config.head_dim(width, heads), config.model_type == "granitemoehybrid"
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-6))
    activation = config.activation("hidden_act", "silu")
    residual = config.number("residual_multiplier", 1.0)
    count, shared = _size_or_none(config, "num_local_experts", 8), 0
    if config.model_type != "granitemoe":
        shared = _size_or_none(config, "shared_intermediate_size", 1024 if is_hybrid else 0)
    if is_hybrid:
        _check_layers(config, layers)
    rotates = not is_hybrid or config.values.get("position_embedding_type") == "rope"

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight", scale=config.number("embedding_multiplier", 1.0))
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0 if rotates else None)
        program.attend(config.number("attention_multiplier", 1.0))
        program.project(Rows("self_attn.o_proj"), scale=residual)
        program.norm("post_attention_layernorm", style)
        if count:
            experts, inner = Experts("block_sparse_moe", count, stacks=_STACKS), config.size("intermediate_size", 11008)
            router, top_k = "block_sparse_moe.router.layer", config.size("num_experts_per_tok", 2)
            program.experts(router, experts, inner, top_k, activation, softmax_after=True, scale=residual)
        if shared:
            both = "shared_mlp.input_linear"
            program.up((Rows(both, 0, 2), Rows(both, 1, 2)), shared, activation)
            program.down(Rows("shared_mlp.output_linear"), shared, scale=residual)
    lm_head = "" if config.flag("tie_word_embeddings", False) else "lm_head"
    program.output("norm", style, lm_head, scale=1.0 / config.number("logits_scaling", 1.0))
    return program


def _size_or_none(config: FamilyConfig, name: str, default: int) -> int:
    """A size, or 0 where the model has no such part."""
    return config.size(name, default) if config.number(name, default) else 0


def _check_layers(config: FamilyConfig, layers: int) -> None:
    # transformers saves them with another name than files on the Hub have.
    if config.values.get("layer_types") not in (["attention"] * layers, [FULL] * layers):
        raise Unsupported("some of its layers keep a state, as Mamba's do")
