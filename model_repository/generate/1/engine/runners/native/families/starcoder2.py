"""StarCoder2: Llama with LayerNorm, biases, an MLP without a gate, and a sliding window in every layer or in none."""

from __future__ import annotations

from ..family_config import SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("starcoder2",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", 2), head_dim)
    style = NormStyle(NormKind.LAYER, config.number("norm_epsilon", 1e-5))
    activation = config.activation("hidden_act", "gelu_pytorch_tanh")
    windows = config.windows(layers, [SLIDING] * layers, config.optional("sliding_window"))

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)
    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0)
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        program.up(Rows("mlp.c_fc"), inner, activation)
        program.down(Rows("mlp.c_proj"), inner)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", True) else "lm_head")
    return program
