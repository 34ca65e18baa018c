"""gpt-oss: mixtures of experts with clamped SiLU and biases, attention sinks, a window in every other layer."""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Experts, Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import Activation, NormKind
from ..unsupported import Unsupported
from ..weights import WeightPacker

MODEL_TYPES = ("gpt_oss",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.size("head_dim", 64)
    count, top_k = config.size("num_local_experts"), config.size("num_experts_per_tok")
    # Those of Activation.CLAMPED_SILU.
    config.expect("swiglu_alpha", 1.702)
    config.expect("swiglu_limit", 7.0)
    if not (config.values.get("rope_parameters") or config.values.get("rope_scaling")):
        raise Unsupported("its config.json has no rope_scaling")
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-5))
    alternating = [FULL if layer % 2 else SLIDING for layer in range(layers)]
    windows = config.windows(layers, alternating, config.optional("sliding_window", 128))
    experts = Experts("mlp.experts", count, alternating=True)

    program = Program(shape, config.vocab_size, [config.rope(head_dim, theta=150000.0)], weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0)
        program.attend(window=windows[layer], sinks="self_attn.sinks")
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        program.experts("mlp.router", experts, inner, top_k, Activation.CLAMPED_SILU, softmax_after=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
