"""StarCoder and SantaCoder: GPT-2 with one KV head (multi-query), or with queries, keys and values by head."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("gpt_bigcode",)
PREFIX = "transformer."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = config.size("n_embd", 768), config.size("n_head", 12), config.size("n_layer", 12)
    inner, kv_heads = config.size("n_inner", 4 * width), 1 if config.flag("multi_query", True) else heads
    config.expect("add_cross_attention", False)
    shape = Shape(width, layers, heads, kv_heads, width // heads)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_epsilon", 1e-5))
    activation = config.activation("activation_function", "gelu_pytorch_tanh")
    scale = None if config.flag("scale_attn_weights", True) else 1.0

    program = Program(shape, config.vocab_size, weights=weights)
    program.embed("wte.weight", positions="wpe.weight", context=config.context)
    for _ in program.layers("h"):
        program.norm("ln_1", style)
        program.qkv(Qkv.grouped(Rows("attn.c_attn")), rope_follows=False)
        program.attend(scale)
        program.project(Rows("attn.c_proj"))
        program.norm("ln_2", style)
        program.up(Rows("mlp.c_fc"), inner, activation)
        program.down(Rows("mlp.c_proj"), inner)
    program.output("ln_f", style, "" if config.flag("tie_word_embeddings", True) else "lm_head")
    return program
