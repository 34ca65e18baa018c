"""Falcon: attention and MLP side by side after one LayerNorm (7B, one KV head) or one each (40B, KV heads with their
queries), or one after the other with ALiBi (RefinedWeb)."""

from __future__ import annotations

from ..alibi import alibi_slopes
from ..family_config import FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import Buffer, NormKind
from ..unsupported import Unsupported
from ..weights import WeightPacker

MODEL_TYPES = ("falcon",)
PREFIX = "transformer."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width = config.size("n_embed", config.size("hidden_size", 4544))
    heads, layers = config.size("num_attention_heads", 71), config.size("num_hidden_layers", 32)
    inner, head_dim = config.size("ffn_hidden_size", 4 * width), width // heads
    is_new, is_parallel = config.flag("new_decoder_architecture", False), config.flag("parallel_attn", True)
    norms = config.size("num_ln_in_parallel_attn", 2 if is_new else 1)
    if (is_new and not is_parallel) or (is_parallel and norms > 1 + is_new):
        raise Unsupported("its parallel_attn and num_ln_in_parallel_attn are those of no Falcon")
    has_one_kv_head = config.flag("multi_query", True) and not is_new
    kv_heads = 1 if has_one_kv_head else config.size("num_kv_heads", heads)
    shape = Shape(width, layers, heads, kv_heads, head_dim)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_epsilon", 1e-5))
    activation = config.activation("activation", "gelu")
    has_alibi = config.flag("alibi", False)
    # transformers rounds slopes times positions to bfloat16, whatever the dtype; here they are exact.
    slopes = alibi_slopes(heads) * head_dim**-0.5 if has_alibi else None

    program = Program(shape, config.vocab_size, [] if has_alibi else [config.rope(head_dim)], weights)
    program.embed("word_embeddings.weight")
    for _ in program.layers("h"):
        if is_parallel and norms == 2:
            program.norm("ln_attn", style)
            program.norm("ln_mlp", style, to=Buffer.SECOND_NORMED)
        else:
            program.norm("input_layernorm", style)
        program.qkv(Qkv.grouped(Rows("self_attention.query_key_value")), rope_follows=not has_alibi)
        if not has_alibi:
            program.rope(0)
        program.attend(slopes=slopes)
        program.project(Rows("self_attention.dense"))
        if not is_parallel:
            program.norm("post_attention_layernorm", style)
        normed = Buffer.SECOND_NORMED if is_parallel and norms == 2 else Buffer.NORMED
        program.up(Rows("mlp.dense_h_to_4h"), inner, activation, normed=normed)
        program.down(Rows("mlp.dense_4h_to_h"), inner)
    program.output("ln_f", style, "" if config.flag("tie_word_embeddings", True) else "lm_head")
    return program
