"""OLMo 2 and 3: norms after attention and MLP, not before them, and of all queries and all keys together.

In OLMo 3 three of four layers attend to a sliding window, with RoPE that is never scaled.
"""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..rope import Rope
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("olmo2", "olmo3")
PREFIX = "model."
_TYPES = (FULL, SLIDING)


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    activation, types = config.activation("hidden_act", "silu"), _layer_types(config, layers)
    windows = config.windows(layers, types, config.optional("sliding_window", 4096))

    program = Program(shape, config.vocab_size, _ropes(config, head_dim), weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("", NO_NORM)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.norm("self_attn.q_norm", style, Buffer.QUERIES, Buffer.QUERIES)
        program.norm("self_attn.k_norm", style, Buffer.KEYS, Buffer.KEYS)
        program.rope(_TYPES.index(types[layer]))
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"), Buffer.BRANCH)
        program.norm("post_attention_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
        program.norm("", NO_NORM)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner, Buffer.BRANCH)
        program.norm("post_feedforward_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program


def _layer_types(config: FamilyConfig, layers: int) -> list[str]:
    if config.model_type == "olmo2":
        return [FULL] * layers
    return config.layer_types(layers, [SLIDING if (layer + 1) % 4 else FULL for layer in range(layers)])


def _ropes(config: FamilyConfig, head_dim: int) -> list[Rope]:
    if config.model_type == "olmo2":
        return [config.rope(head_dim)]
    return [config.rope(head_dim, layer_type=kind, theta=500000.0, scaled=kind == FULL) for kind in _TYPES]
