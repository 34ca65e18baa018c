"""Compares the attention kernels with plain attention once at load, on the shapes of a model.

A kernel that this device or this release of triton-lang compiles wrongly must not serve: then the blocks are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kv_cache import LayerShape
from . import block_attention
from .query_tiles import QueryTiles, tile_rows

# The context before the queries: some blocks, no multiple of a run of keys.
_CONTEXT = 101
_PROMPT_ROWS = 19
# Of the values' standard deviation, which is 1.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


def check(
    layers: Sequence[LayerShape], config: Any, block_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError where a result differs; an error of the compiler passes through."""
    heads = int(config.num_attention_heads)
    window, softcap = getattr(config, "sliding_window", None), getattr(config, "attn_logit_softcapping", None)
    for layer in dict.fromkeys(layers):
        # Families with a sliding window have layers without one, too.
        for span in dict.fromkeys((None, window and min(int(window), _CONTEXT // 2))):
            _check(layer, heads, span, softcap, block_tokens, dtype, device)


def _check(
    shape: LayerShape, heads: int, window: int | None, softcap: float | None, block_tokens: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    length = _CONTEXT + _PROMPT_ROWS
    blocks = -(-length // block_tokens)
    table = torch.arange(blocks, device=device, dtype=torch.int32).flip(0)
    slots = (table.long()[:, None] * block_tokens + torch.arange(block_tokens, device=device)).flatten()[:length]
    keys, values = normal(length, shape.heads, shape.key_width), normal(length, shape.heads, shape.value_width)
    cached_keys, cached_values = (part.new_zeros(blocks * block_tokens, *part.shape[1:]) for part in (keys, values))
    block_attention.write(keys, values, cached_keys, cached_values, slots)
    query = normal(heads, _PROMPT_ROWS, shape.key_width)
    scale = shape.key_width**-0.5
    expected = _plain(query, keys, values, scale, window, softcap)
    rows = tile_rows(heads // shape.heads, dtype)
    for height, splits in ((1, 1), (1, 4), (rows, 1)):
        starts = torch.arange(0, _PROMPT_ROWS, height, device=device, dtype=torch.int32)
        tiles = QueryTiles(
            table[None], starts, (_PROMPT_ROWS - starts).clamp(max=height), starts + _CONTEXT, torch.zeros_like(starts),
            height,
        )  # fmt: skip
        result = block_attention.attend(
            query, cached_keys, cached_values, [tiles], block_tokens, scale, window, softcap, splits
        )
        error = float((result.float() - expected).abs().max())
        if not error <= _TOLERANCE[dtype]:
            raise ValueError(
                f"an attention kernel is off by {error:.2g} on {shape}, tiles of {height}, {splits} splits"
            )


def _plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None,
    softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the last rows over all keys, in float32: (rows, heads, width)."""
    repeats = query.shape[0] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(repeats, 1).transpose(0, 1) for part in (keys, values))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    positions = torch.arange(_CONTEXT, _CONTEXT + query.shape[1], device=query.device)
    distance = positions[:, None] - torch.arange(keys.shape[1], device=query.device)
    allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ values).transpose(0, 1)
