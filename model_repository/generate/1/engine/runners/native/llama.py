"""Checkpoints of Llama's families (Llama, Mistral, Qwen 2 and 3): which ones the kernels support, and where each tensor
goes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from tritonlm.contract import Checkpoint

from .structures import Layer, Model, Weights
from .weights import WeightPacker, interleave_blocks

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PREFIX = "model."
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SILU = ("silu", "swish")
_QUERY, _KEY, _VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def unsupported_reason(config: dict[str, Any]) -> str:
    """Why the kernels do not support this checkpoint; empty if they do."""
    missing = [name for name in _SIZES if not (isinstance(config.get(name), int) and config[name] > 0)]
    if missing:
        return f"its config.json has no {missing[0]}"
    heads, kv_heads, head_dim = _heads(config)
    supported = {
        "its activation is not SiLU": config.get("hidden_act", "silu") in _SILU,
        "its widths are not multiples of 32": config["hidden_size"] % 32 == config["intermediate_size"] % 32 == 0,
        "its head size is not a multiple of 32 up to 128": head_dim % 32 == 0 and 0 < head_dim <= 128,
        "its query heads per KV head are not 1 to 16": kv_heads > 0
        and heads % kv_heads == 0
        and 1 <= heads // kv_heads <= 16,
        "it uses sliding-window attention": not _has_sliding_window(config),
        "its RoPE parameters are not supported": _is_rope_supported(config),
    }
    return next((reason for reason, holds in supported.items() if not holds), "")


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Query heads, KV heads, and the size of a head."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return heads, kv_heads, int(config.get("head_dim") or config["hidden_size"] // heads)


def _has_sliding_window(config: dict[str, Any]) -> bool:
    """Whether attention's window is shorter than the context."""
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    window = config.get("sliding_window")
    return bool(used) and window is not None and window < config.get("max_position_embeddings", math.inf)


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, from `rope_parameters` or from transformers' older keys."""
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    top_level = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    return {"rope_theta": 10000.0, **top_level, **parameters, "rope_type": rope_type}


def _is_rope_supported(config: dict[str, Any]) -> bool:
    parameters = _rope_parameters(config)
    names = ("rope_theta", *_REQUIRED.get(parameters["rope_type"], ()))
    complete = all(isinstance(parameters.get(name), (int, float)) for name in names)
    return complete and parameters["rope_type"] in _SCALINGS and parameters.get("partial_rotary_factor", 1.0) == 1.0


def _default(inv_freq: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    return inv_freq


def _linear(inv_freq: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    return inv_freq / float(parameters["factor"])


def _llama3(inv_freq: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Divides low frequencies by the factor, keeps high ones, and interpolates between them."""
    context, low, high, factor = (
        float(parameters[name])
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    rotations = context * inv_freq / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3}
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def inv_freq_of(config: dict[str, Any]) -> torch.Tensor:
    """RoPE's frequencies, head_dim / 2 of them: radians per position."""
    parameters, head_dim = _rope_parameters(config), _heads(config)[2]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / parameters["rope_theta"] ** exponents
    return _SCALINGS[parameters["rope_type"]](inv_freq, parameters)


def read(checkpoint: Checkpoint, packer: WeightPacker) -> Model:
    config, vocab_size = checkpoint.config, checkpoint.vocab_size
    width, inner, num_layers = (int(config[n]) for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv_heads, head_dim = _heads(config)
    layers = (Layer * num_layers)()

    def linear(names: Sequence[str], inputs: int, *outputs: int, gated: bool = False) -> Weights:
        """Several layers with the same inputs, as one."""
        combine = interleave_blocks if gated else torch.cat
        weights = [packer.get(f"{name}.weight", count, inputs) for name, count in zip(names, outputs, strict=True)]
        biases = [
            packer.get(f"{name}.bias", count) if packer.has(f"{name}.bias") else torch.zeros(count)
            for name, count in zip(names, outputs, strict=True)
        ]
        has_bias = any(packer.has(f"{name}.bias") for name in names)
        return packer.linear(combine(weights), combine(biases) if has_bias else None)

    def head_norm(name: str) -> int | None:
        return packer.vector(name, head_dim) if packer.has(name) else None

    for number in range(num_layers):
        prefix = f"layers.{number}."
        layers[number] = Layer(
            packer.vector(f"{prefix}input_layernorm.weight", width), None,
            packer.vector(f"{prefix}post_attention_layernorm.weight", width), None,
            head_norm(f"{prefix}self_attn.q_norm.weight"), head_norm(f"{prefix}self_attn.k_norm.weight"),
            linear(
                [prefix + name for name in (_QUERY, _KEY, _VALUE)], width,
                heads * head_dim, kv_heads * head_dim, kv_heads * head_dim,
            ),
            linear([f"{prefix}self_attn.o_proj"], heads * head_dim, width),
            linear([f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"], width, inner, inner, gated=True),
            linear([f"{prefix}mlp.down_proj"], inner, width),
        )  # fmt: skip
    packer.hold_structure(layers)
    embedding = packer.linear(packer.get("embed_tokens.weight", vocab_size, width))
    tied = config.get("tie_word_embeddings", False)
    return Model(
        num_layers=num_layers, hidden_size=width, num_heads=heads, heads_per_kv=heads // kv_heads, head_dim=head_dim,
        intermediate_size=inner, gated=1, vocab_size=vocab_size, epsilon=float(config.get("rms_norm_eps", 1e-6)),
        token_embedding=embedding,
        lm_head=embedding if tied else packer.linear(packer.get("lm_head.weight", vocab_size, width)),
        inv_freq=packer.hold(inv_freq_of(config)), final_norm_weight=packer.vector("norm.weight", width),
        layer=ctypes.addressof(layers),
    )  # fmt: skip
