"""GPT-2's checkpoints: which of them the kernels compute, and where each number of theirs goes."""

from __future__ import annotations

import ctypes
from typing import Any

from tritonlm.contract import Checkpoint

from .structures import Layer, Model, Weights
from .weights import LANES, Packing

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def inner_width(config: dict[str, Any]) -> int:
    return int(config.get("n_inner") or 4 * int(config.get("n_embd", 768)))


def why_not(config: dict[str, Any]) -> str:
    """What of this checkpoint the kernels cannot compute; empty where they can."""
    width, heads = int(config.get("n_embd", 768)), int(config.get("n_head", 12))
    wanted = {
        "its activation is not the tanh form of GELU": config.get("activation_function", "gelu_new") in _TANH_GELU,
        "its widths are not multiples of 32": width % 32 == inner_width(config) % 32 == 0,
        "its heads are not as wide as a multiple of 16, up to 128": heads > 0
        and width % heads == 0
        and (width // heads) % LANES == 0
        and width // heads <= 128,
        "its attention is scaled in another way": config.get("scale_attn_weights", True)
        and not config.get("scale_attn_by_inverse_layer_idx", False),
        "it attends to another sequence too": not config.get("add_cross_attention", False),
        "its output layer is not its token embedding": config.get("tie_word_embeddings", True),
    }
    return next((reason for reason, holds in wanted.items() if not holds), "")


def read(checkpoint: Checkpoint, packing: Packing) -> Model:
    about, vocabulary = checkpoint.config, checkpoint.vocab_size
    width, heads, layers = (int(about[name]) for name in ("n_embd", "n_head", "n_layer"))
    inner, found = inner_width(about), (Layer * layers)()

    def product(name: str, inputs: int, outputs: int) -> Weights:
        weight = packing.get(f"{name}.weight", inputs, outputs).t()
        return packing.product(weight, packing.get(f"{name}.bias", outputs))

    for number in range(layers):
        at = f"h.{number}."
        norms = [packing.vector(f"{at}{n}.{part}", width) for n in ("ln_1", "ln_2") for part in ("weight", "bias")]
        found[number] = Layer(
            *norms, None, None,
            product(f"{at}attn.c_attn", width, 3 * width),
            product(f"{at}attn.c_proj", width, width),
            product(f"{at}mlp.c_fc", width, inner),
            product(f"{at}mlp.c_proj", inner, width),
        )  # fmt: skip
    packing.keep(found)
    tokens = packing.product(packing.get("wte.weight", vocabulary, width))
    return Model(
        layers=layers, width=width, heads=heads, shared=1, head_width=width // heads, inner=inner,
        vocabulary=vocabulary, epsilon=float(about.get("layer_norm_epsilon", 1e-5)), tokens=tokens, output=tokens,
        positions=packing.vector("wpe.weight", int(about["n_positions"]), width),
        final_scale=packing.vector("ln_f.weight", width), final_shift=packing.vector("ln_f.bias", width),
        layer=ctypes.addressof(found),
    )  # fmt: skip
