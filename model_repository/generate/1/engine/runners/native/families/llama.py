"""Llama, and families of its structure: Mistral and Ministral (windows), Qwen 2 (biases of queries, keys and values),
Qwen 3 (head norms), Arcee (an MLP of ReLU² without a gate).
"""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "arcee")
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    is_gated = config.model_type != "arcee"
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-6 if is_gated else 1e-5))
    activation = config.activation("hidden_act", "silu" if is_gated else "relu2")
    windows = _windows(config, layers)

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        if config.model_type == "qwen3":
            program.rope(0, "self_attn.q_norm", "self_attn.k_norm", style)
        else:
            program.rope(0)
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        up = Rows("mlp.up_proj")
        program.up((Rows("mlp.gate_proj"), up) if is_gated else up, inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program


def _windows(config: FamilyConfig, layers: int) -> list[int | None]:
    if config.model_type in ("mistral", "ministral"):
        return config.windows(layers, [SLIDING] * layers, config.optional("sliding_window", 4096))
    if config.model_type in ("llama", "arcee") or not config.flag("use_sliding_window", False):
        return [None] * layers
    full = int(config.number("max_window_layers", 28))
    default = [SLIDING if layer >= full else FULL for layer in range(layers)]
    return config.windows(layers, default, config.optional("sliding_window", 4096))
