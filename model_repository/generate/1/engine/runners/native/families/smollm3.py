"""SmolLM3: Llama with layers without RoPE, which may attend in a sliding window."""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..unsupported import Unsupported
from ..weights import WeightPacker

MODEL_TYPES = ("smollm3",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads"), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-6))
    activation = config.activation("hidden_act", "silu")
    rotates = _rotating_layers(config, layers)
    slides = config.flag("use_sliding_window", False)
    types = [SLIDING if slides and not rotates[layer] else FULL for layer in range(layers)]
    windows = config.windows(layers, types, config.optional("sliding_window"))

    program = Program(shape, config.vocab_size, [config.rope(head_dim, theta=2000000.0)], weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0 if rotates[layer] else None)
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", True) else "lm_head")
    return program


def _rotating_layers(config: FamilyConfig, layers: int) -> list[int]:
    """`no_rope_layers`, which is 1 for the layers with RoPE."""
    interval = config.size("no_rope_layer_interval", 4)
    rotates = config.values.get("no_rope_layers")
    if rotates is None:
        return [(layer + 1) % interval for layer in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers:
        raise Unsupported(f"its no_rope_layers are not {layers}")
    return rotates
