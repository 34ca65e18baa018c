"""BLOOM: ALiBi instead of positions, a LayerNorm on embeddings, queries, keys and values by head."""

from __future__ import annotations

from ..alibi import alibi_slopes
from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import Activation, Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("bloom",)
PREFIX = "transformer."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    # Each of the sizes has two names.
    width = config.size("n_embed", config.size("hidden_size", 64))
    heads = config.size("n_head", config.size("num_attention_heads", 8))
    layers = config.size("n_layer", config.size("num_hidden_layers", 2))
    # Its results with several slices lack biases.
    config.expect("slow_but_exact", False)
    is_residual_normed = config.flag("apply_residual_connection_post_layernorm", False)
    shape = Shape(width, layers, heads, heads, width // heads)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_epsilon", 1e-5))

    program = Program(shape, config.vocab_size, weights=weights)
    program.embed("word_embeddings.weight")
    program.norm("word_embeddings_layernorm", style, to=Buffer.RESIDUAL)
    for _ in program.layers("h"):
        _norm(program, "input_layernorm", style, is_residual_normed)
        program.qkv(Qkv.grouped(Rows("self_attention.query_key_value")), rope_follows=False)
        program.attend(slopes=alibi_slopes(heads))
        program.project(Rows("self_attention.dense"))
        _norm(program, "post_attention_layernorm", style, is_residual_normed)
        program.up(Rows("mlp.dense_h_to_4h"), 4 * width, Activation.GELU_TANH)
        program.down(Rows("mlp.dense_4h_to_h"), 4 * width)
    program.output("ln_f", style, "" if config.flag("tie_word_embeddings", True) else "lm_head")
    return program


def _norm(program: Program, name: str, style: NormStyle, is_residual_normed: bool) -> None:
    if is_residual_normed:
        program.norm(name, style, to=Buffer.RESIDUAL)
        program.norm("", NO_NORM)
    else:
        program.norm(name, style)
