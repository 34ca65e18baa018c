"""GPT-J: attention and MLP side by side after one LayerNorm; neighbouring dimensions of a part of each head rotate."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("gptj",)
PREFIX = "transformer."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = config.size("n_embd", 4096), config.size("n_head", 16), config.size("n_layer", 28)
    inner, head_dim = config.size("n_inner", 4 * width), width // heads
    config.expect("tie_word_embeddings", False)
    shape = Shape(width, layers, heads, heads, head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_epsilon", 1e-5))
    activation = config.activation("activation_function", "gelu_new")
    rope = config.rope(head_dim, partial=config.size("rotary_dim", 64) / head_dim, interleaved=True)

    program = Program(shape, config.vocab_size, [rope], weights)
    program.embed("wte.weight")
    for _ in program.layers("h"):
        program.norm("ln_1", style)
        program.qkv(Qkv.separate("attn.q_proj", "attn.k_proj", "attn.v_proj"))
        program.rope(0)
        program.attend()
        program.project(Rows("attn.out_proj"))
        program.up(Rows("mlp.fc_in"), inner, activation)
        program.down(Rows("mlp.fc_out"), inner)
    program.output("ln_f", style, "lm_head")
    return program
