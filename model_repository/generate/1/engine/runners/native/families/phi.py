"""Phi 1 and 2: attention and MLP side by side after one LayerNorm, RoPE on a part of each head, biases everywhere."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("phi",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    config.expect("tie_word_embeddings", False)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_eps", 1e-5))
    head_style = style if config.flag("qk_layernorm", False) else NO_NORM
    activation = config.activation("hidden_act", "gelu_new")

    program = Program(shape, config.vocab_size, [config.rope(head_dim, partial=0.5)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0, "self_attn.q_layernorm", "self_attn.k_layernorm", head_style)
        program.attend()
        program.project(Rows("self_attn.dense"))
        program.up(Rows("mlp.fc1"), inner, activation)
        program.down(Rows("mlp.fc2"), inner)
    program.output("final_layernorm", style, "lm_head")
    return program
