"""Attention over the paged KV cache, as a function for Hugging Face's modelling code.

It is registered as `NAME` in transformers' attention registry. The runner passes the step's batch and cache through the
model's keyword arguments. This is the reference in pure torch, exact and for every device; a batch in tiles goes to the
kernels of `gpu`. It does not know requests or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .flat_batch import AttentionGroup, FlatBatch
from .gpu import block_attention, rotary
from .kv_cache import KVCache, LayerShape

NAME = "tritonlm_paged"
# Arguments of transformers that have no effect here: the engine neither trains nor returns attention weights.
_IGNORED = {
    "dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position",
    "sliding_window",
}  # fmt: skip


@dataclass
class Paged:
    """The batch and the cache of the current step."""

    batch: FlatBatch
    cache: KVCache


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Paged | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, width) of the flat batch → (1, tokens, heads, width)."""
    assert paged is not None
    assert attention_mask is None
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rotation = rotary.of(module)
    if paged.batch.tiles:
        keys, values, slots = paged.cache.keys[layer], paged.cache.values[layer], paged.batch.slots
        if rotation:
            angles = rotation.take(query, key)
            rows = rotary.rotate_and_write(query[0], key[0], value[0], angles, keys, values, slots)
        else:
            block_attention.write(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, slots)
            rows = query[0]
        tiles, tokens = paged.batch.tiles, paged.cache.block_tokens
        rows = block_attention.attend(rows, keys, values, tiles, tokens, scale, sliding_window, softcap)
        return rows.unsqueeze(0), None
    assert rotation is None, "rotations are deferred where attention reads the blocks in place"
    paged.cache.write(layer, paged.batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    for group in paged.batch.groups:
        keys, values = paged.cache.read(layer, group.slots)
        output[group.rows] = _attend(query[0], keys, values, group, scale, sliding_window, softcap)
    return output.unsqueeze(0), None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: AttentionGroup,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One group's rows: (sequences × queries, heads, width)."""
    heads, repeats = query.shape[0], query.shape[0] // keys.shape[1]
    sequences = group.slots.shape[0]
    # GQA: the query heads of one KV head become further queries of it, so keys and values are not repeated.
    folded = (
        query[:, group.rows]
        .view(keys.shape[1], repeats, sequences, group.queries, -1)
        .permute(2, 0, 1, 3, 4)
        .reshape(sequences, keys.shape[1], repeats * group.queries, -1)
    )
    mask = group.mask(window, repeats)
    if softcap is None:
        result = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = torch.tanh(folded @ keys.transpose(-1, -2) * (scale / softcap)) * softcap + mask
        result = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    return (
        result.reshape(sequences, keys.shape[1], repeats, group.queries, -1)
        .permute(0, 3, 1, 2, 4)
        .reshape(sequences * group.queries, heads, -1)
    )


class Probe:
    """Replaces `paged_attention` once at load: plain causal attention that records the shape of each layer.

    The rows are those of sequences of `tokens` each, one after the other."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.layers: dict[int, LayerShape] = {}
        # What `paged_attention` would not compute, and "paged", which it needs.
        self.unknown: set[str] = set()
        # Sliding windows that a layer has in its mask alone: `paged_attention` gets no masks.
        self.masked_windows: set[int] = set()
        self._masks: dict[int, torch.Tensor] = {}

    def mask(self, *_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
        """In place of the function that makes transformers' masks: one that says its window, if it has one."""
        return None if local_size is None else self._masks.setdefault(local_size, torch.tensor(local_size))

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        assert isinstance(layer, int)
        window = next((size for size, mask in self._masks.items() if mask is attention_mask), None)
        if window is not None and window != options.get("sliding_window"):
            self.masked_windows.add(window)
        # A second call would overwrite the layer's keys and values.
        options |= {
            "attention_mask": attention_mask if window is None else None,
            "second_call": layer in self.layers or None,
        }
        self.layers[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        if rotation := rotary.of(module):
            rotation.compare(query, key, value)
        self.unknown |= {name for name, option in options.items() if option is not None and name not in _IGNORED}
        repeats = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ keys.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows = torch.arange(scores.shape[-1], device=scores.device)
        is_attended = (rows[:, None] >= rows) & (rows[:, None] // self._tokens == rows // self._tokens)
        scores = scores.masked_fill(~is_attended, float("-inf"))
        # Contiguous, as the result of every attention of transformers: some families view it in another shape.
        return (scores.softmax(-1).to(values.dtype) @ values).transpose(1, 2).contiguous(), None
