"""Hunyuan without experts: Llama with norms of each head's query and key after RoPE, whose base may be stretched."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("hunyuan_v1_dense",)
PREFIX = "model."
_ROPE_TYPES = {"dynamic": "ntk_alpha"}


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation = config.activation("hidden_act", "silu")

    program = Program(shape, config.vocab_size, [config.rope(head_dim, aliases=_ROPE_TYPES)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0)
        program.rope(None, "self_attn.query_layernorm", "self_attn.key_layernorm", style)
        program.attend()
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
