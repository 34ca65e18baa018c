"""GPT-2: learned positions, LayerNorm before attention and MLP."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Columns, Qkv
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads = config.size("n_embd", 768), config.size("n_head", 12)
    inner = config.size("n_inner", 4 * width)
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("add_cross_attention", False)
    config.expect("tie_word_embeddings", True)
    shape = Shape(width, config.size("n_layer", 12), heads, heads, width // heads)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_epsilon", 1e-5))
    activation = config.activation("activation_function", "gelu_new")

    program = Program(shape, config.vocab_size, weights=weights)
    program.embed("wte.weight", positions="wpe.weight", context=config.context)
    for _ in program.layers("h"):
        program.norm("ln_1", style)
        program.qkv(Qkv.stacked(Columns("attn.c_attn")), rope_follows=False)
        program.attend()
        program.project(Columns("attn.c_proj"))
        program.norm("ln_2", style)
        program.up(Columns("mlp.c_fc"), inner, activation)
        program.down(Columns("mlp.c_proj"), inner)
    program.output("ln_f", style, "")
    return program
