"""Phi 3 and 4: one matrix of queries, keys and values, and one of gate and up.

With longrope texts of any length get the factors of the longest one served, because cached keys keep their rotation.
"""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("phi3",)
PREFIX = "model."
_ROPE_TYPES = {"su": "longrope", "yarn": "longrope"}


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation, window = config.activation("hidden_act", "silu"), config.optional("sliding_window")
    original = config.size("original_max_position_embeddings", 4096)
    rope = config.rope(head_dim, partial=1.0, original=original, aliases=_ROPE_TYPES)

    program = Program(shape, config.vocab_size, [rope], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.stacked(Rows("self_attn.qkv_proj")))
        program.rope(0)
        program.attend(window=None if window is None else int(window))
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        program.up((Rows("mlp.gate_up_proj", 0, 2), Rows("mlp.gate_up_proj", 1, 2)), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
