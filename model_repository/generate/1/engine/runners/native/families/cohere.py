"""Cohere's Command R: attention and MLP in parallel, LayerNorm without bias, interleaved RoPE, scaled logits.

Command R+ also normalizes queries and keys, with weights for each head. In Command R7B (cohere2) most layers attend to
a sliding window, and only those have RoPE.
"""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("cohere", "cohere2")
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_eps", 1e-5))
    head_style = style if config.model_type == "cohere" and config.flag("use_qk_norm", False) else NO_NORM
    activation = config.activation("hidden_act", "silu")
    second = config.model_type == "cohere2"
    rope = config.rope(head_dim, theta=None if second else 500000.0, interleaved=True)
    windows = _windows(config, layers) if second else [None] * layers

    program = Program(shape, config.vocab_size, [rope], weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        rotation = None if second and windows[layer] is None else 0
        program.rope(rotation, "self_attn.q_norm", "self_attn.k_norm", head_style, own_weights=True)
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"))
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    lm_head = "" if config.flag("tie_word_embeddings", True) else "lm_head"
    program.output("norm", style, lm_head, scale=config.number("logit_scale", 0.0625))
    return program


def _windows(config: FamilyConfig, layers: int) -> list[int | None]:
    pattern = config.size("sliding_window_pattern", 4)
    default = [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
    return config.windows(layers, default, config.optional("sliding_window", 4096))
