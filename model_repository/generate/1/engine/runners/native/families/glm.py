"""GLM 4: RoPE rotates neighbouring dimensions of a half of each head, and gate and up are one matrix.

GLM-4-0414 (glm4) has norms also after attention and MLP.
"""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("glm", "glm4")
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.size("head_dim", 128)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", 2), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1.5625e-7))
    activation, rope = config.activation("hidden_act", "silu"), config.rope(head_dim, partial=0.5, interleaved=True)
    normed_after = config.model_type == "glm4"
    to = Buffer.BRANCH if normed_after else Buffer.RESIDUAL

    program = Program(shape, config.vocab_size, [rope], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0)
        program.attend()
        program.project(Rows("self_attn.o_proj"), to)
        if normed_after:
            program.norm("post_self_attn_layernorm", style, to, Buffer.RESIDUAL, add=True)
        program.norm("post_attention_layernorm", style)
        program.up((Rows("mlp.gate_up_proj", 0, 2), Rows("mlp.gate_up_proj", 1, 2)), inner, activation)
        program.down(Rows("mlp.down_proj"), inner, to)
        if normed_after:
            program.norm("post_mlp_layernorm", style, to, Buffer.RESIDUAL, add=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
