"""GPT-2 checkpoints: which ones the kernels support, and where each tensor goes."""

from __future__ import annotations

import ctypes
from typing import Any

from tritonlm.contract import Checkpoint

from .structures import Layer, Model, Weights
from .weights import BLOCK_OUTPUTS, WeightPacker

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def intermediate_size(config: dict[str, Any]) -> int:
    return int(config.get("n_inner") or 4 * int(config.get("n_embd", 768)))


def unsupported_reason(config: dict[str, Any]) -> str:
    """Why the kernels do not support this checkpoint; empty if they do."""
    width, heads = int(config.get("n_embd", 768)), int(config.get("n_head", 12))
    supported = {
        "its activation is not GELU's tanh approximation": config.get("activation_function", "gelu_new") in _TANH_GELU,
        "its widths are not multiples of 32": width % 32 == intermediate_size(config) % 32 == 0,
        "its head size is not a multiple of 16 up to 128": heads > 0
        and width % heads == 0
        and (width // heads) % BLOCK_OUTPUTS == 0
        and width // heads <= 128,
        "its attention scale is not 1/sqrt(head size)": config.get("scale_attn_weights", True)
        and not config.get("scale_attn_by_inverse_layer_idx", False),
        "it has cross-attention": not config.get("add_cross_attention", False),
        "its word embeddings are not tied": config.get("tie_word_embeddings", True),
    }
    return next((reason for reason, holds in supported.items() if not holds), "")


def read(checkpoint: Checkpoint, packer: WeightPacker) -> Model:
    config, vocab_size = checkpoint.config, checkpoint.vocab_size
    width, heads, num_layers = (int(config[name]) for name in ("n_embd", "n_head", "n_layer"))
    inner, layers = intermediate_size(config), (Layer * num_layers)()

    def linear(name: str, inputs: int, outputs: int) -> Weights:
        weight = packer.get(f"{name}.weight", inputs, outputs).t()
        return packer.linear(weight, packer.get(f"{name}.bias", outputs))

    for number in range(num_layers):
        prefix = f"h.{number}."
        norms = [packer.vector(f"{prefix}{n}.{part}", width) for n in ("ln_1", "ln_2") for part in ("weight", "bias")]
        layers[number] = Layer(
            *norms, None, None,
            linear(f"{prefix}attn.c_attn", width, 3 * width),
            linear(f"{prefix}attn.c_proj", width, width),
            linear(f"{prefix}mlp.c_fc", width, inner),
            linear(f"{prefix}mlp.c_proj", inner, width),
        )  # fmt: skip
    packer.hold_structure(layers)
    embedding = packer.linear(packer.get("wte.weight", vocab_size, width))
    return Model(
        num_layers=num_layers, hidden_size=width, num_heads=heads, heads_per_kv=1, head_dim=width // heads,
        intermediate_size=inner, vocab_size=vocab_size, epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        token_embedding=embedding, lm_head=embedding,
        position_embedding=packer.vector("wpe.weight", int(config["n_positions"]), width),
        final_norm_weight=packer.vector("ln_f.weight", width), final_norm_bias=packer.vector("ln_f.bias", width),
        layer=ctypes.addressof(layers),
    )  # fmt: skip
