"""The query rows of a step in tiles, for attention that reads the blocks of the KV cache where they lie.

A tile is a run of consecutive tokens of one sequence. Decoding sequences have tiles of one token each and are computed
together; prompts have larger tiles. This module knows plans and shapes, and no kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...scheduling.blocks import PADDING_BLOCK
from ...scheduling.scheduler import Slice

# Rows of a tile times query heads of a KV head: the height of the products that a GPU computes at once. In float32 it
# computes them without tensor cores, and a large tile takes a quarter of a minute to compile.
_TILE_HEIGHT, _FLOAT32_HEIGHT, _MOST_ROWS = 128, 32, 64


@dataclass(frozen=True)
class QueryTiles:
    """`tables` has a row of block numbers for each sequence; the others have a number for each tile. All are int32."""

    tables: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    sequences: torch.Tensor
    # The most rows of a tile.
    height: int


def tile_rows(repeats: int, dtype: torch.dtype) -> int:
    """The rows of a prompt's tile, for as many query heads of a KV head: a power of two."""
    height = _FLOAT32_HEIGHT if dtype == torch.float32 else _TILE_HEIGHT
    return min(_MOST_ROWS, max(height // (1 << (repeats - 1).bit_length()), 1))


def build(plan: Sequence[Slice], most_rows: int, device: torch.device) -> list[QueryTiles]:
    """The tiles of decoding slices, and those of the others."""
    first_rows = np.cumsum([0, *(piece.count for piece in plan)])
    groups = []
    for height, members in (
        (1, [n for n, piece in enumerate(plan) if piece.count == 1]),
        (most_rows, [n for n, piece in enumerate(plan) if piece.count > 1]),
    ):
        if members:
            groups.append(_tiles([plan[n] for n in members], [int(first_rows[n]) for n in members], height, device))
    return groups


def _tiles(plan: Sequence[Slice], first_rows: Sequence[int], height: int, device: torch.device) -> QueryTiles:
    width = max(len(piece.request.table.blocks) for piece in plan)
    tables = np.full((len(plan), width), PADDING_BLOCK, dtype=np.int32)
    for number, piece in enumerate(plan):
        tables[number, : len(piece.request.table.blocks)] = piece.request.table.blocks
    tiles = tiles_of(first_rows, [p.count for p in plan], [p.start for p in plan], range(len(plan)), height)
    rows, counts, starts, sequences = torch.from_numpy(tiles).to(device)
    return QueryTiles(torch.from_numpy(tables).to(device), rows, counts, starts, sequences, height)


def tiles_of(
    first_rows: Iterable[int], counts: Iterable[int], starts: Iterable[int], sequences: Iterable[int], height: int
) -> npt.NDArray[np.int32]:
    """Rows, counts, starts and sequences of the tiles of these runs of tokens: (4, tiles)."""
    tiles = [
        (row + done, min(height, count - done), start + done, sequence)
        for row, count, start, sequence in zip(first_rows, counts, starts, sequences, strict=True)
        for done in range(0, count, height)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 4).T.copy()
