"""OPT: learned positions from the third row on; LayerNorm before attention and MLP or, as in OPT-350m, after them,
where embeddings are narrower than the model."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Columns, Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Projection, Shape
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("opt",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, narrow = config.size("ffn_dim"), config.size("word_embed_proj_dim", width)
    shape = Shape(width, layers, heads, heads, width // heads)
    style = NormStyle(NormKind.LAYER, 1e-5)
    activation = config.activation("activation_function", "relu")
    is_first = config.flag("do_layer_norm_before", True)
    has_last = is_first and not config.flag("_remove_final_layer_norm", False)
    has_weights = config.flag("layer_norm_elementwise_affine", True)
    attention_norm, mlp_norm, last_norm = (
        name if has_weights else "" for name in ("self_attn_layer_norm", "final_layer_norm", "decoder.final_layer_norm")
    )
    is_projected = narrow != width
    enter = Projection(Rows("decoder.project_in"), narrow) if is_projected else None
    leave = Projection(Columns("decoder.project_out"), narrow) if is_projected else None

    program = Program(shape, config.vocab_size, weights=weights)
    program.embed(
        "decoder.embed_tokens.weight", positions="decoder.embed_positions.weight", context=config.context,
        first_position=2, projection=enter,
    )  # fmt: skip
    for _ in program.layers("decoder.layers"):
        program.norm(attention_norm, style if is_first else NO_NORM)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), rope_follows=False)
        program.attend()
        program.project(Rows("self_attn.out_proj"))
        if not is_first:
            program.norm(attention_norm, style, to=Buffer.RESIDUAL)
        program.norm(mlp_norm, style if is_first else NO_NORM)
        program.up(Rows("fc1"), inner, activation)
        program.down(Rows("fc2"), inner)
        if not is_first:
            program.norm(mlp_norm, style, to=Buffer.RESIDUAL)
    tied = "decoder.embed_tokens" if is_projected else ""
    lm_head = tied if config.flag("tie_word_embeddings", True) else "lm_head"
    program.output(last_norm, style if has_last else NO_NORM, lm_head, projection=leave)
    return program
