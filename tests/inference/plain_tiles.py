"""Attention over the blocks in place without a GPU and without triton-lang: the launches of the kernels, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from engine.runners.gpu import block_attention, fused_layers, rotary, self_check
from engine.runners.gpu.query_tiles import QueryTiles


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other kernels are not used."""
    monkeypatch.setattr(block_attention, "is_possible", lambda _: True)
    monkeypatch.setattr(block_attention, "write", _write)
    monkeypatch.setattr(block_attention, "attend", _attend)
    monkeypatch.setattr(self_check, "check", lambda *_: None)
    monkeypatch.setattr(fused_layers, "fuse", lambda _, **__: 0)
    monkeypatch.setattr(rotary, "install", lambda _: None)


def _write(
    keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    key_cache[slots], value_cache[slots] = keys, values


def _attend(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, tiles: Sequence[QueryTiles],
    block_tokens: int, scale: float, window: int | None = None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    # Rows that belong to no tile stay as the memory was: here they would spoil what reads them.
    output = torch.full((query.shape[1], query.shape[0], value_cache.shape[-1]), torch.nan)
    repeats = query.shape[0] // key_cache.shape[1]
    for group in tiles:
        columns = (group.rows, group.counts, group.starts, group.sequences)
        for row, count, start, sequence in zip(*(column.tolist() for column in columns), strict=True):
            assert count <= group.height
            if not count:
                continue
            blocks = group.tables[sequence][: -(-(start + count) // block_tokens)].long()
            slots = (blocks[:, None] * block_tokens + torch.arange(block_tokens)).flatten()[: start + count]
            keys, values = (cache[slots].repeat_interleave(repeats, 1) for cache in (key_cache, value_cache))
            scores = torch.einsum("hqd,khd->hqk", query[:, row : row + count], keys) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            distance = torch.arange(start, start + count)[:, None] - torch.arange(start + count)
            allowed = (distance >= 0) & (distance < (window or start + count + 1))
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            output[row : row + count] = torch.einsum("hqk,khd->qhd", weights, values)
    return output
