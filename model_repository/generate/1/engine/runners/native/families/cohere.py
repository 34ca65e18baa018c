"""Cohere's Command R: attention and MLP in parallel, LayerNorm without bias, interleaved RoPE, scaled logits.

Command R+ also normalizes queries and keys, with weights for each head.
"""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("cohere",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_eps", 1e-5))
    head_style = style if config.flag("use_qk_norm", False) else NO_NORM
    activation = config.activation("hidden_act", "silu")
    rope = config.rope(head_dim, theta=500000.0, interleaved=True)

    program = Program(shape, config.vocab_size, [rope], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0, "self_attn.q_norm", "self_attn.k_norm", head_style, own_weights=True)
        program.attend()
        program.project(Rows("self_attn.o_proj"))
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    lm_head = "" if config.flag("tie_word_embeddings", True) else "lm_head"
    program.output("norm", style, lm_head, scale=config.number("logit_scale", 0.0625))
    return program
