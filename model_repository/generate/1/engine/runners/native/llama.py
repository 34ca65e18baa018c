"""Llama's checkpoints and those of its kin (Mistral, Qwen 2 and 3): which of them the kernels compute, and where each
number of theirs goes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from tritonlm.contract import Checkpoint

from .structures import Layer, Model, Weights
from .weights import Packing, by_turns

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PREFIX = "model."
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SILU = ("silu", "swish")
_QUERY, _KEY, _VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def why_not(config: dict[str, Any]) -> str:
    """What of this checkpoint the kernels cannot compute; empty where they can."""
    unnamed = [name for name in _SIZES if not (isinstance(config.get(name), int) and config[name] > 0)]
    if unnamed:
        return f"its config.json names no {unnamed[0]}"
    heads, groups, head = _heads(config)
    wanted = {
        "its activation is not SiLU": config.get("hidden_act", "silu") in _SILU,
        "its widths are not multiples of 32": config["hidden_size"] % 32 == config["intermediate_size"] % 32 == 0,
        "its heads are not as wide as a multiple of 32, up to 128": head % 32 == 0 and 0 < head <= 128,
        "its heads of queries are not 1 to 16 for each of keys": groups > 0
        and heads % groups == 0
        and 1 <= heads // groups <= 16,
        "it looks back no further than a window": not _window(config),
        "its positions are told in another way": _turns_are_known(config),
    }
    return next((reason for reason, holds in wanted.items() if not holds), "")


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Of queries, of keys and values; and how wide each is."""
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    return heads, groups, int(config.get("head_dim") or config["hidden_size"] // heads)


def _window(config: dict[str, Any]) -> bool:
    """Whether tokens stop being seen before the context ends."""
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    window = config.get("sliding_window")
    return bool(used) and window is not None and window < config.get("max_position_embeddings", math.inf)


def _turning(config: dict[str, Any]) -> dict[str, Any]:
    """How places become angles, in today's form and in older ones."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = given.get("rope_type") or given.get("type") or "default"
    told = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    return {"rope_theta": 10000.0, **told, **given, "rope_type": kind}


def _turns_are_known(config: dict[str, Any]) -> bool:
    about = _turning(config)
    given = all(
        isinstance(about.get(name), (int, float)) for name in ("rope_theta", *_NEEDED.get(about["rope_type"], ()))
    )
    return given and about["rope_type"] in _TURNS and about.get("partial_rotary_factor", 1.0) == 1.0


def _plain(turns: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    return turns


def _linear(turns: torch.Tensor, about: dict[str, Any]) -> torch.Tensor:
    return turns / float(about["factor"])


def _llama3(turns: torch.Tensor, about: dict[str, Any]) -> torch.Tensor:
    """Slow turns are made slower, fast ones stay, and those between are between."""
    before, low, high, factor = (
        float(about[name])
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    rounds = before * turns / (2 * math.pi)
    kept = ((rounds - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turns / factor + kept * turns


_TURNS = {"default": _plain, "linear": _linear, "llama3": _llama3}
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def turns_of(config: dict[str, Any]) -> torch.Tensor:
    """How far one place turns each pair of numbers of a head, in radians."""
    about, head = _turning(config), _heads(config)[2]
    plain = 1.0 / about["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.int64).float() / head)
    return _TURNS[about["rope_type"]](plain, about)


def read(checkpoint: Checkpoint, packing: Packing) -> Model:
    about, vocabulary = checkpoint.config, checkpoint.vocab_size
    width, inner, layers = (int(about[n]) for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, groups, head = _heads(about)
    found = (Layer * layers)()

    def product(names: Sequence[str], inputs: int, *outputs: int, gated: bool = False) -> Weights:
        """Of several layers that stand side by side."""
        together = by_turns if gated else torch.cat
        weights = [packing.get(f"{name}.weight", count, inputs) for name, count in zip(names, outputs, strict=True)]
        biases = [
            packing.get(f"{name}.bias", count) if packing.has(f"{name}.bias") else torch.zeros(count)
            for name, count in zip(names, outputs, strict=True)
        ]
        biased = any(packing.has(f"{name}.bias") for name in names)
        return packing.product(together(weights), together(biases) if biased else None)

    def scale(name: str) -> int | None:
        return packing.vector(name, head) if packing.has(name) else None

    for number in range(layers):
        at = f"layers.{number}."
        found[number] = Layer(
            packing.vector(f"{at}input_layernorm.weight", width), None,
            packing.vector(f"{at}post_attention_layernorm.weight", width), None,
            scale(f"{at}self_attn.q_norm.weight"), scale(f"{at}self_attn.k_norm.weight"),
            product([at + n for n in (_QUERY, _KEY, _VALUE)], width, heads * head, groups * head, groups * head),
            product([f"{at}self_attn.o_proj"], heads * head, width),
            product([f"{at}mlp.gate_proj", f"{at}mlp.up_proj"], width, inner, inner, gated=True),
            product([f"{at}mlp.down_proj"], inner, width),
        )  # fmt: skip
    packing.keep(found)
    tokens = packing.product(packing.get("embed_tokens.weight", vocabulary, width))
    tied = about.get("tie_word_embeddings", False)
    return Model(
        layers=layers, width=width, heads=heads, shared=heads // groups, head_width=head, inner=inner, gated=1,
        vocabulary=vocabulary, epsilon=float(about.get("rms_norm_eps", 1e-6)), tokens=tokens,
        output=tokens if tied else packing.product(packing.get("lm_head.weight", vocabulary, width)),
        turns=packing.hold(turns_of(about)), final_scale=packing.vector("norm.weight", width),
        layer=ctypes.addressof(found),
    )  # fmt: skip
