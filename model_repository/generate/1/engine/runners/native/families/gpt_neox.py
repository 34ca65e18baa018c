"""GPT-NeoX and Pythia: attention and MLP side by side, each with its LayerNorm, or one after the other; a part of
each head rotates."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("gpt_neox",)
PREFIX = "gpt_neox."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), width // heads
    shape = Shape(width, layers, heads, heads, head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_eps", 1e-5))
    activation = config.activation("hidden_act", "gelu")
    is_parallel = config.flag("use_parallel_residual", True)
    rope = config.rope(head_dim, theta_name="rotary_emb_base", partial=config.number("rotary_pct", 0.25))

    program = Program(shape, config.vocab_size, [rope], weights)
    program.embed("embed_in.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        if is_parallel:
            program.norm("post_attention_layernorm", style, to=Buffer.SECOND_NORMED)
        program.qkv(Qkv.grouped(Rows("attention.query_key_value")))
        program.rope(0)
        program.attend()
        program.project(Rows("attention.dense"))
        if not is_parallel:
            program.norm("post_attention_layernorm", style, to=Buffer.SECOND_NORMED)
        program.up(Rows("mlp.dense_h_to_4h"), inner, activation, normed=Buffer.SECOND_NORMED)
        program.down(Rows("mlp.dense_4h_to_h"), inner)
    lm_head = "embed_out" if program.has("embed_out.weight") else "lm_head"
    program.output("final_layer_norm", style, "" if config.flag("tie_word_embeddings", False) else lm_head)
    return program
