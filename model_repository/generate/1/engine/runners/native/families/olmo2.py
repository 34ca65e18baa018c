"""OLMo 2: norms after attention and MLP, not before them, and of all queries and all keys together."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("olmo2",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation = config.activation("hidden_act", "silu")

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("", NO_NORM)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.norm("self_attn.q_norm", style, Buffer.QUERIES, Buffer.QUERIES)
        program.norm("self_attn.k_norm", style, Buffer.KEYS, Buffer.KEYS)
        program.rope(0)
        program.attend()
        program.project(Rows("self_attn.o_proj"), Buffer.BRANCH)
        program.norm("post_attention_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
        program.norm("", NO_NORM)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner, Buffer.BRANCH)
        program.norm("post_feedforward_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
