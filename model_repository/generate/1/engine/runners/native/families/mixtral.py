"""Mixtral: Mistral with a mixture of experts in place of each MLP; the weights of the best experts add up to 1."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Experts, Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("mixtral",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    count, top_k = config.size("num_local_experts"), config.size("num_experts_per_tok")
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation = config.activation("hidden_act", "silu")
    window = int(config.number("sliding_window", 0))

    program = Program(shape, config.vocab_size, [config.rope(head_dim, theta=1e6)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0)
        program.attend(window=window)
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        # Its first name, which files on the Hub have; "mlp" where transformers saved its own names.
        block = "block_sparse_moe" if program.has("block_sparse_moe.gate.weight") else "mlp"
        experts = Experts(f"{block}.experts", count, parts=("w1", "w3", "w2"))
        program.experts(f"{block}.gate", experts, inner, top_k, activation, renormalize=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
