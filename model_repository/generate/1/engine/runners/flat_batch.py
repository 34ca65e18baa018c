"""The input tensors of one step: all slices of a plan as one flat batch, and groups of equal shape for attention.

Attention computes decoding slices of similar context length together, padded to the longest. It computes a prompt chunk
alone. The tensors that all layers share (cache slots, masks) are made once per step. This module does not know what the
model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..scheduling.blocks import PADDING_BLOCK
from ..scheduling.scheduler import Slice
from .gpu import query_tiles
from .gpu.query_tiles import QueryTiles

# Context lengths are padded to multiples of this, the width of vector units. Then the padding does not change the order
# of summation of a sequence, and its logits are the same alone and in a batch with longer ones.
LENGTH_STEP = 16


@dataclass
class AttentionGroup:
    """Sequences with the same number of queries: positions (sequences, queries), cache slots (sequences, length)."""

    rows: torch.Tensor
    queries: int
    slots: torch.Tensor
    positions: torch.Tensor
    dtype: torch.dtype
    _masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeats: int) -> torch.Tensor:
        """The additive attention mask: 0 or -inf, of the shape (sequences, 1, repeats × queries, length).

        `repeats` is the number of query heads per KV head (GQA). They are folded into the query dimension.
        """
        if (window, repeats) not in self._masks:
            keys = torch.arange(self.slots.shape[1], device=self.slots.device)
            distance = self.positions.unsqueeze(-1) - keys
            allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(
                ~allowed, float("-inf")
            )
            self._masks[window, repeats] = mask.repeat(1, repeats, 1).unsqueeze(1)
        return self._masks[window, repeats]


@dataclass(frozen=True)
class FlatBatch:
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    # The cache slot of each token's keys and values.
    slots: torch.Tensor
    groups: list[AttentionGroup]
    # The rows whose logits are needed, and the rows whose last hidden states are needed, in the plan's order.
    logit_rows: torch.Tensor
    hidden_rows: torch.Tensor
    # In place of groups, for attention that reads the blocks where they lie.
    tiles: list[QueryTiles] = field(default_factory=list)


def build(
    plan: Sequence[Slice], block_tokens: int, dtype: torch.dtype, device: torch.device, tile_rows: int = 0
) -> FlatBatch:
    """`tile_rows` above 0 makes tiles with as many rows at most; else there are groups."""
    ids: list[int] = []
    logit_rows: list[int] = []
    hidden_rows: list[int] = []
    first_rows: list[int] = []
    for piece in plan:
        first_rows.append(len(ids))
        logit_rows += (len(ids) + row for row in piece.logit_rows)
        hidden_rows += (len(ids) + row for row in piece.hidden_rows)
        ids += piece.ids
    positions = np.concatenate([np.arange(p.start, p.start + p.count) for p in plan])
    slots = np.concatenate([_slots_of(p, block_tokens)[p.start : p.start + p.count] for p in plan])

    def tensor(values: object) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=device)

    ids_row, positions_row = tensor(ids).unsqueeze(0), tensor(positions).unsqueeze(0)
    common = (ids_row, positions_row, tensor(slots))
    if tile_rows:
        tiles = query_tiles.build(plan, tile_rows, device)
        return FlatBatch(*common, [], tensor(logit_rows), tensor(hidden_rows), tiles)
    groups = []
    for members in _grouped(plan, block_tokens):
        count = plan[members[0]].count
        longest = max(_length(plan[i]) for i in members)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        table = np.full((len(members), length), PADDING_BLOCK * block_tokens, dtype=np.int64)
        for row, i in enumerate(members):
            table[row, : _length(plan[i])] = _slots_of(plan[i], block_tokens)
        starts = np.array([[plan[i].start] for i in members]) + np.arange(count)
        rows = np.concatenate([np.arange(first_rows[i], first_rows[i] + count) for i in members])
        groups.append(AttentionGroup(tensor(rows), count, tensor(table), tensor(starts), dtype))
    return FlatBatch(*common, groups, tensor(logit_rows), tensor(hidden_rows))


def _length(piece: Slice) -> int:
    return piece.start + piece.count


def _slots_of(piece: Slice, block_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The cache slots of the request's tokens, from its first to the last of the slice."""
    blocks = np.asarray(piece.request.table.blocks, dtype=np.int64)
    slots = (blocks[:, None] * block_tokens + np.arange(block_tokens)).reshape(-1)
    return slots[: _length(piece)]


def _grouped(plan: Sequence[Slice], block_tokens: int) -> list[list[int]]:
    """Groups of plan indexes for attention: decoding slices by the bit length of their block count, prompts alone."""
    decoding: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for index, piece in enumerate(plan):
        if piece.count == 1:
            decoding.setdefault((_length(piece) // block_tokens).bit_length(), []).append(index)
        else:
            groups.append([index])
    return [*decoding.values(), *groups]
