"""StableLM: Llama with LayerNorm and RoPE on a part of each head; in some, attention and MLP are side by side, or each
head has its own norm."""

from __future__ import annotations

from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..structures import NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("stablelm",)
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), width // heads
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", 32), head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_eps", 1e-5))
    head_style = style if config.flag("qk_layernorm", False) else NO_NORM
    activation = config.activation("hidden_act", "silu")
    is_parallel = config.flag("use_parallel_residual", False)

    program = Program(shape, config.vocab_size, [config.rope(head_dim, partial=0.25)], weights)
    program.embed("embed_tokens.weight")
    for _ in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0, "self_attn.q_layernorm.norms", "self_attn.k_layernorm.norms", head_style, own_weights=True)
        program.attend()
        program.project(Rows("self_attn.o_proj"))
        if not is_parallel:
            program.norm("post_attention_layernorm", style)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program
