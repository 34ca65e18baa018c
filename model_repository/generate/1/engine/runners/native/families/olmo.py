"""OLMo: LayerNorm without weights; queries, keys and values are clipped."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("olmo",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.LAYER, 1e-5)
    activation = config.activation("hidden_act", "silu")
    clip = config.optional("clip_qkv")

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), clip=clip or 0.0)
        program.rope(0)
        program.attend()
        program.project(Rows("self_attn.o_proj"))
        program.norm("", style)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    program.output("", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
