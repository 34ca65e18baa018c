"""GPT-Neo: GPT-2 with scores that are not scaled, and layers that attend to everything or to a window."""

from __future__ import annotations

from itertools import chain

from ..family_config import FULL, SLIDING, FamilyConfig
from ..linear import Qkv, Rows
from ..program import NormStyle, Program, Shape
from ..structures import NormKind
from ..unsupported import Unsupported
from ..weights import WeightPacker

MODEL_TYPES = ("gpt_neo",)
PREFIX = "transformer."
_LAYER_TYPES = {"global": FULL, "local": SLIDING}


def write(config: FamilyConfig, weights: WeightPacker | None) -> Program:
    width, heads, layers = (config.size(n) for n in ("hidden_size", "num_heads", "num_layers"))
    inner = config.size("intermediate_size", 4 * width)
    shape = Shape(width, layers, heads, heads, width // heads)
    style = NormStyle(NormKind.LAYER, config.number("layer_norm_epsilon", 1e-5))
    activation = config.activation("activation_function", "gelu_new")
    windows = config.windows(layers, _layer_types(config), config.size("window_size", 256))

    program = Program(shape, config.vocab_size, weights=weights)
    program.embed("wte.weight", positions="wpe.weight", context=config.context)
    for layer in program.layers("h"):
        program.norm("ln_1", style)
        names = (f"attn.attention.{name}_proj" for name in "qkv")
        program.qkv(Qkv.separate(*names), rope_follows=False)
        program.attend(1.0, window=windows[layer])
        program.project(Rows("attn.attention.out_proj"))
        program.norm("ln_2", style)
        program.up(Rows("mlp.c_fc"), inner, activation)
        program.down(Rows("mlp.c_proj"), inner)
    program.output("ln_f", style, "" if config.flag("tie_word_embeddings", True) else "lm_head")
    return program


def _layer_types(config: FamilyConfig) -> list[str]:
    """[[["global", "local"], 12]]: both types in turn, twelve times."""
    groups = config.values.get("attention_types") or [[["global", "local"], 12]]
    try:
        return [_LAYER_TYPES[name] for name in chain.from_iterable(types * count for types, count in groups)]
    except (KeyError, TypeError, ValueError):
        raise Unsupported(f"its attention_types are {groups!r}") from None
