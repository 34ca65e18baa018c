"""OLMoE: a mixture of experts in each layer, and norms of all heads' queries together, and of their keys."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Experts, Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("olmoe",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), width // heads
    count, top_k = config.size("num_experts"), config.size("num_experts_per_tok")
    renormalize = config.flag("norm_topk_prob", False)
    config.expect("head_dim", head_dim)
    # It would follow the norms.
    config.expect("clip_qkv", None)
    config.expect("sliding_window", None)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation = config.activation("hidden_act", "silu")

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.norm("self_attn.q_norm", style, Buffer.QUERIES, Buffer.QUERIES)
        program.norm("self_attn.k_norm", style, Buffer.KEYS, Buffer.KEYS)
        program.rope(0)
        program.attend()
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        program.experts("mlp.gate", Experts("mlp.experts", count), inner, top_k, activation, renormalize=renormalize)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
