"""Granite: Llama with multipliers of embeddings, attention's scores, residuals and logits."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("granite",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-6))
    activation = config.activation("hidden_act", "silu")
    residual = config.number("residual_multiplier", 1.0)

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight", scale=config.number("embedding_multiplier", 1.0))
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0)
        program.attend(config.number("attention_multiplier", 1.0))
        program.project(Rows("self_attn.o_proj"), scale=residual)
        program.norm("post_attention_layernorm", style)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner, scale=residual)
    lm_head = "" if config.flag("tie_word_embeddings", False) else "lm_head"
    program.output("norm", style, lm_head, scale=1.0 / config.number("logits_scaling", 1.0))
    return program
