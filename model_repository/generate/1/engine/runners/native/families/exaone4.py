"""EXAONE 4: norms of each head's query and key, and after attention and MLP, not before them.

In its large model three of four layers attend to a sliding window, and only those have RoPE.
"""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("exaone4",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", 32), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation, window = config.activation("hidden_act", "silu"), config.optional("sliding_window", 4096)
    windows = config.windows(layers, _default_types(config, layers, window), window)

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("", NO_NORM)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        rotates = window is None or windows[layer] is not None
        program.rope(0 if rotates else None, "self_attn.q_norm", "self_attn.k_norm", style)
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"), Buffer.BRANCH)
        program.norm("post_attention_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
        program.norm("", NO_NORM)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner, Buffer.BRANCH)
        program.norm("post_feedforward_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program


def _default_types(config: FamilyConfig, layers: int, window: float | None) -> list[str]:
    if window is None:
        return [FULL] * layers
    pattern = config.size("sliding_window_pattern", 4) if not config.values.get("layer_types") else 1
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
