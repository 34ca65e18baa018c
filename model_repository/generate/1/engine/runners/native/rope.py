"""RoPE: its frequencies, from config.json, and the order of a head's dimensions that the kernels rotate.

The kernels rotate dimension d with dimension d + half, `half` a multiple of 16 (rope.hpp). Where a family pairs
dimensions otherwise (interleaved, or a part of the head only), rows of the query and key matrices are put into that
order, which changes no product of a query and a key. This module knows config.json, not which tensors there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .unsupported import Unsupported

_LANES = 16
Parameters = dict[str, Any]
# A dimension of a padded head that the checkpoint does not have.
PADDING = -1


@dataclass(frozen=True, eq=False)
class Rope:
    """`rotary_dim` of a head's dimensions rotate; `factor` multiplies cosines and sines."""

    inv_freq: torch.Tensor
    rotary_dim: int
    factor: float = 1.0
    interleaved: bool = False

    @property
    def half(self) -> int:
        return -(-self.rotary_dim // (2 * _LANES)) * _LANES

    def padded_inv_freq(self) -> torch.Tensor:
        """Frequency 0 neither rotates nor multiplies."""
        return torch.nn.functional.pad(self.inv_freq.float(), (0, self.half - len(self.inv_freq)))

    def order(self, head_dim: int, padded: int) -> list[int]:
        """For each dimension of the kernels' head, that of the checkpoint's."""
        pairs = self.rotary_dim // 2
        first = range(0, 2 * pairs, 2) if self.interleaved else range(pairs)
        second = range(1, 2 * pairs, 2) if self.interleaved else range(pairs, 2 * pairs)
        rest = [*range(self.rotary_dim, head_dim), *[PADDING] * (padded - head_dim)]
        fill = self.half - pairs
        return [*first, *rest[:fill], *second, *rest[fill : 2 * fill], *rest[2 * fill :]]


def rope_of(
    config: dict[str, Any],
    head_dim: int,
    *,
    aliases: dict[str, str] | None = None,
    interleaved: bool = False,
    served_context: int | None = None,
    **choices: Any,
) -> Rope:
    """RoPE as config.json describes it, with the choices of rope_parameters(); `aliases` are a family's types.

    No text is longer than `served_context`, which is that of config.json unless it is given."""
    parameters = rope_parameters(config, **choices)
    parameters["served_context"] = served_context or parameters["context_length"]
    rope_type = str(parameters["rope_type"])
    rope_type = (aliases or {}).get(rope_type, rope_type)
    refusal = f"its RoPE parameters are not supported: rope_type is {rope_type}"
    names = ("rope_theta", "partial_rotary_factor", *_REQUIRED.get(rope_type, ()))
    if rope_type not in _TYPES or not all(_is_number(parameters.get(name)) for name in names):
        raise Unsupported(refusal)
    rotary_dim = int(head_dim * parameters["partial_rotary_factor"])
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise Unsupported(f"its RoPE rotates {rotary_dim} of {head_dim} dimensions")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    try:
        inv_freq, factor = _TYPES[rope_type](1.0 / parameters["rope_theta"] ** exponents, parameters)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise Unsupported(refusal) from error
    return Rope(inv_freq, rotary_dim, factor, interleaved)


def rope_parameters(
    config: dict[str, Any], *, layer_type: str = "", theta: float | None = None, theta_name: str = "rope_theta",
    partial: float | None = None, original: int | None = None, scaled: bool = True,
) -> Parameters:  # fmt: skip
    """RoPE's parameters, from `rope_parameters` or from older keys: `theta_name`, and rope_scaling if `scaled`.

    Where config.json distinguishes types of layers they are those of `layer_type`. Of a family are the default `theta`,
    the default `partial` (the rotating part of a head: without it whole heads rotate), and the `original` context."""
    written, scaling = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if not isinstance(written, dict) or not isinstance(scaling, dict):
        raise Unsupported("its config.json has a value of the wrong type: RoPE's parameters are no mapping")
    scaling = scaling if scaled else {}
    own = {**(written[layer_type] or {}), **scaling} if layer_type in written else scaling or written
    context, part = config.get("max_position_embeddings"), config.get("partial_rotary_factor")
    parameters = {
        "rope_theta": config.get(theta_name) or theta or 10000.0,
        "partial_rotary_factor": partial if part is None else part,
        "original_max_position_embeddings": context, "context_length": context,
        **own, "rope_type": own.get("rope_type") or own.get("type") or "default",
    }  # fmt: skip
    if original := original or config.get("original_max_position_embeddings"):
        parameters["original_max_position_embeddings"] = original
    if parameters["partial_rotary_factor"] is None:
        parameters["partial_rotary_factor"] = 1.0
    if partial is None and parameters["partial_rotary_factor"] != 1.0:
        raise Unsupported("its RoPE rotates a part of each head")
    return parameters


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default(inv_freq: torch.Tensor, _: Parameters) -> tuple[torch.Tensor, float]:
    # "dynamic" changes frequencies beyond max_position_embeddings only, where no request gets.
    return inv_freq, 1.0


def _linear(inv_freq: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    return inv_freq / float(parameters["factor"]), 1.0


def _ntk_alpha(inv_freq: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """The base is multiplied by alpha^(dim / (dim - 2)), whatever the length of a text."""
    alpha, step = float(parameters.get("alpha") or 1.0), 2 / (2 * len(inv_freq) - 2)
    return inv_freq / alpha ** (step * torch.arange(len(inv_freq))), 1.0


def _llama3(inv_freq: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """Divides low frequencies by the factor, keeps high ones, and interpolates between them."""
    context, low, high, factor = (
        float(parameters[name])
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    rotations = context * inv_freq / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq, 1.0


def _yarn(inv_freq: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """Keeps dimensions that rotate `beta_fast` times within the original context, divides those that rotate less than
    `beta_slow` times by the factor, and goes over linearly, dimension by dimension."""
    factor, theta, dim = float(parameters["factor"]), float(parameters["rope_theta"]), 2 * len(inv_freq)
    original = parameters["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    divided = ((torch.arange(len(inv_freq)).float() - low) / (high - low or 0.001)).clamp(0, 1)
    return divided * inv_freq / factor + (1 - divided) * inv_freq, _yarn_attention_factor(factor, parameters)


def _yarn_attention_factor(factor: float, parameters: Parameters) -> float:
    if (attention_factor := parameters.get("attention_factor")) is not None:
        return float(attention_factor)

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _longrope(inv_freq: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, float]:
    """A factor for each frequency: the long ones if texts may be longer than the original context."""
    original = parameters["original_max_position_embeddings"]
    factors = parameters.get("long_factor" if parameters["served_context"] > original else "short_factor")
    if not isinstance(factors, list) or len(factors) != len(inv_freq):
        raise Unsupported("its RoPE parameters are not supported: longrope needs a factor for each frequency")
    # It follows from config.json alone, whatever the context that is served.
    stretched = parameters.get("factor") or parameters["context_length"] / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if stretched <= 1 else math.sqrt(1 + math.log(stretched) / math.log(original))
    return inv_freq / torch.tensor(factors, dtype=torch.float32), float(attention_factor)


_TYPES: dict[str, Callable[[torch.Tensor, Parameters], tuple[torch.Tensor, float]]] = {
    "default": _default, "dynamic": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope, "ntk_alpha": _ntk_alpha,
}  # fmt: skip
_REQUIRED = {
    "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("context_length", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
