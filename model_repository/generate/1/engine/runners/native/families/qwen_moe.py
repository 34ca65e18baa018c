"""Qwen 2 and Qwen 3 with mixtures of experts in some layers; Qwen 2 adds a shared expert, scaled by its own gate."""

from __future__ import annotations

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Experts, Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..unsupported import Unsupported
from ..weights import WeightPacker

MODEL_TYPES = ("qwen2_moe", "qwen3_moe")
PREFIX = "model."


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # transformers saves Qwen 3 with another name for the number of experts than files on the Hub have.
    count = config.size("num_experts", config.values.get("num_local_experts"))
    inner, top_k = config.size("moe_intermediate_size"), config.size("num_experts_per_tok")
    renormalize, head_dim = config.flag("norm_topk_prob", False), config.head_dim(width, heads)
    shape = Shape(width, layers, heads, config.size("num_key_value_heads", heads), head_dim)
    style = NormStyle(NormKind.RMS, config.number("rms_norm_eps", 1e-6))
    activation = config.activation("hidden_act", "silu")
    is_second, experts = config.model_type == "qwen2_moe", Experts("mlp.experts", count)
    norms = () if is_second else ("self_attn.q_norm", "self_attn.k_norm", style)
    gate = "mlp.shared_expert_gate.weight" if is_second else ""
    windows, sparse = _windows(config, layers), _sparse_layers(config, layers)

    program = Program(shape, config.vocab_size, [config.rope(head_dim)], weights)

    def mlp(name: str, inner: int, row_scaled: bool = False) -> None:
        program.up((Rows(f"{name}.gate_proj"), Rows(f"{name}.up_proj")), inner, activation)
        program.down(Rows(f"{name}.down_proj"), inner, row_scaled=row_scaled)

    program.embed("embed_tokens.weight")
    for layer in program.layers("layers"):
        program.norm("input_layernorm", style)
        program.qkv(Qkv.separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        program.rope(0, *norms)
        program.attend(window=windows[layer])
        program.project(Rows("self_attn.o_proj"))
        program.norm("post_attention_layernorm", style)
        if not sparse[layer]:
            mlp("mlp", config.size("intermediate_size"))
            continue
        program.experts("mlp.gate", experts, inner, top_k, activation, renormalize=renormalize, shared_gate=gate)
        if is_second:
            mlp("mlp.shared_expert", config.size("shared_expert_intermediate_size"), row_scaled=True)
    program.output("norm", style, "" if config.flag("tie_word_embeddings", False) else "lm_head")
    return program


def _sparse_layers(config: FamilyConfig, layers: int) -> list[bool]:
    step, dense = config.size("decoder_sparse_step", 1), config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise Unsupported("its mlp_only_layers are not a list")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]


def _windows(config: FamilyConfig, layers: int) -> list[int | None]:
    window = config.optional("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    if config.model_type == "qwen3_moe":
        return [None if window is None else int(window)] * layers
    last = int(config.number("max_window_layers", 28)) if window else 0
    default = [SLIDING if layer < last and layer % 2 == 0 else FULL for layer in range(layers)]
    if SLIDING in config.layer_types(layers, default) and not window:
        raise Unsupported("its layer_types name sliding windows, and use_sliding_window does not")
    return config.windows(layers, default, window)
