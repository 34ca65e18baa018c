"""Gemma 2 and 3: Gemma with norms also after attention and MLP, and a sliding window in most layers.

Gemma 2 caps scores and logits. Gemma 3 normalizes queries and keys, and rotates by the type of a layer.
"""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NO_NORM, NormStyle, Program, Shape
from ..rope import Rope
from ..structures import Buffer, NormKind
from ..weights import WeightPacker

MODEL_TYPES = ("gemma2", "gemma3_text")
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    inner, head_dim = config.size("intermediate_size"), config.size("head_dim", 256)
    second = config.model_type == "gemma2"
    config.expect("use_bidirectional_attention", False)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads"), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-6), offset=1.0)
    head_style = NO_NORM if second else style
    activation = config.activation("hidden_activation", "gelu_pytorch_tanh")
    pattern = 2 if second else config.size("sliding_window_pattern", 6)
    types = config.layer_types(layers, [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)])
    windows = config.windows(layers, types, config.optional("sliding_window", 4096))
    scale = config.size("query_pre_attn_scalar", 256) ** -0.5
    softcap = config.optional("attn_logit_softcapping", 50.0 if second else None)

    program = Program(shape, config.vocab_size, _ropes(config, head_dim), weights)
    program.embed("embed_tokens.weight", scale=width**0.5)
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0 if second else _TYPES.index(types[layer]), "self_attn.q_norm", "self_attn.k_norm", head_style)
        program.attend(scale, window=windows[layer], softcap=softcap)
        program.project(Rows("self_attn.o_proj"), Buffer.BRANCH)
        program.norm("post_attention_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
        program.norm("pre_feedforward_layernorm", style)
        program.up((Rows("mlp.gate_proj"), Rows("mlp.up_proj")), inner, activation)
        program.down(Rows("mlp.down_proj"), inner, Buffer.BRANCH)
        program.norm("post_feedforward_layernorm", style, Buffer.BRANCH, Buffer.RESIDUAL, add=True)
    softcap = config.optional("final_logit_softcapping", 30.0 if second else None)
    lm_head = "" if config.flag("tie_word_embeddings", True) else "lm_head"
    program.output("norm", style, lm_head, softcap=softcap)
    return program


_TYPES = (FULL, SLIDING)


def _ropes(config: FamilyConfig, head_dim: int) -> list[Rope]:
    if config.model_type == "gemma2":
        return [config.rope(head_dim)]
    # Hugging Face's code of Gemma 3 ignores it.
    config.expect("attn_logit_softcapping", None)
    sliding = {"theta": 10000.0, "theta_name": "rope_local_base_freq", "scaled": False}
    return [
        config.rope(head_dim, layer_type=FULL, theta=1000000.0),
        config.rope(head_dim, layer_type=SLIDING, **sliding),
    ]
