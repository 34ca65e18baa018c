"""Defers the rotation of queries and keys (RoPE) to the attention, which rotates and writes them in one launch.

Hugging Face's attention layers rotate before they call the attention function, in about ten launches. A layer here gets
a copy of its forward, in which `apply_rotary_pos_emb` returns its arguments and keeps the angles for the attention. The
class and its module stay as they are. The layer is compared first: the kernel must give the numbers of its own
rotation, and the attention must get what that returned. Where a family rotates otherwise (interleaved pairs, a part of
the numbers cut off before), its own code stays. This module knows no families.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .block_attention import dense, on_device, power_of_two

_log = logging.getLogger("tritonlm.engine")
# The name of the rotation in the modules of transformers.
_FUNCTION = "apply_rotary_pos_emb"
_ATTRIBUTE = "deferred_rotation"
# A unit in the last place of the dtype, of the largest number.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

Pair = tuple[torch.Tensor, torch.Tensor]


class DeferredRotation:
    """The rotation of one layer. At first it rotates as before, and is compared with the kernel."""

    def __init__(self, original: Callable[..., Pair]) -> None:
        self._original = original
        self.defers = False
        # Whether the kernel computes it, once it has been compared.
        self.is_equal = False
        # Arguments of the last call, and what it returned.
        self._last: tuple[tuple[torch.Tensor, ...], Pair] | None = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, *angles: torch.Tensor, **options: Any) -> Pair:
        if self.defers:
            self._last = (query, key, *angles), (query, key)
            return query, key
        rotated = self._original(query, key, *angles, **options)
        # Other arguments choose other rotations.
        self._last = ((query, key, *angles), rotated) if len(angles) == 2 and not options else None
        return rotated

    def take(self, query: torch.Tensor, key: torch.Tensor) -> Pair:
        """The angles of the rotation that was deferred: cos and sin."""
        assert self._last is not None
        (_, _, cos, sin), returned = self._last
        assert query is returned[0]
        assert key is returned[1]
        self._last = None
        return cos, sin

    def compare(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Compare the kernel with the last rotation, whose result should be this query and key."""
        last, self._last = self._last, None
        if last is None or last[1][0] is not query or last[1][1] is not key:
            return
        (query_before, key_before, cos, sin), _ = last
        if cos.shape[-2] == query.shape[2] and cos.shape == sin.shape and cos.shape[-1] <= query.shape[-1]:
            try:
                self.is_equal = _is_equal((query_before, key_before), (cos, sin), (query, key), value)
            except Exception as error:  # the compiler of triton-lang may raise anything
                _log.warning("rotations are not deferred, because the kernel fails here: %s", error)


def of(layer: nn.Module) -> DeferredRotation | None:
    rotation = getattr(layer, _ATTRIBUTE, None)
    return rotation if isinstance(rotation, DeferredRotation) else None


def _is_equal(before: Pair, angles: Pair, rotated: Pair, value: torch.Tensor) -> bool:
    """Whether the kernel rotates queries and keys likewise, and writes keys and values."""
    keys, values = (part[0].transpose(0, 1).contiguous() for part in (rotated[1], value))
    written_keys, written_values = torch.zeros_like(keys), torch.zeros_like(values)
    slots = torch.arange(len(keys), device=keys.device)
    query = rotate_and_write(before[0][0], before[1][0], value[0], angles, written_keys, written_values, slots)
    pairs = ((query, rotated[0][0]), (written_keys, keys), (written_values, values))
    return all(_is_near(actual, expected) for actual, expected in pairs)


def install(model: nn.Module) -> None:
    """Give each attention layer that rotates a forward of its own. Nothing is deferred yet."""
    for layer in model.modules():
        forward: Any = type(layer).forward
        if not isinstance(forward, FunctionType) or _FUNCTION not in forward.__code__.co_names:
            continue
        rotation = DeferredRotation(forward.__globals__[_FUNCTION])
        own = FunctionType(
            forward.__code__, {**forward.__globals__, _FUNCTION: rotation}, forward.__name__, forward.__defaults__,
            forward.__closure__,
        )  # fmt: skip
        own.__kwdefaults__ = forward.__kwdefaults__
        setattr(layer, _ATTRIBUTE, rotation)
        layer.forward = MethodType(own, layer)


def settle(model: nn.Module, *, defers: bool) -> int:
    """Defer the rotations that the kernel computes, and return how many; the other layers get their forward back."""
    count = 0
    for layer in model.modules():
        if (rotation := of(layer)) is None:
            continue
        if defers and rotation.is_equal:
            rotation.defers = True
            count += 1
        else:
            del layer.forward
            delattr(layer, _ATTRIBUTE)
    return count


def rotate_and_write(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, angles: Pair, key_cache: torch.Tensor,
    value_cache: torch.Tensor, slots: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Rotate queries and keys, (heads, tokens, width), and write keys and values to their slots.

    The angles are (1, tokens, rotated numbers). Return the queries, in the memory order of (tokens, heads, width).
    """
    query, key, value = dense(query), dense(key), dense(value)
    cos, sin = (dense(part) for part in angles)
    heads, tokens, width = query.shape
    rotated = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    rotary, value_width = cos.shape[-1], value.shape[-1]
    with on_device(query.device):
        _kernels().rotate_and_write[tokens, heads + len(key)](
            query, key, value, cos, sin, rotated, key_cache, value_cache, slots, query.stride(1), query.stride(0),
            key.stride(1), key.stride(0), value.stride(1), value.stride(0), cos.stride(-2), sin.stride(-2),
            key_cache.stride(0), value_cache.stride(0), heads, width, value_width, rotary, power_of_two(rotary // 2),
            power_of_two(max(width, value_width)), num_warps=1,
        )  # fmt: skip
    return rotated.transpose(0, 1)


def _is_near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (actual.float() - expected.float()).abs().max()
    return bool(difference <= _TOLERANCE[actual.dtype] * expected.float().abs().max().clamp(min=1e-6))


@functools.cache
def _kernels() -> Any:
    from .kernels import rotary  # noqa: PLC0415 (triton-lang is slow to import, and missing on most CPUs)

    return rotary
