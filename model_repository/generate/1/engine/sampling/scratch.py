"""How many rows of logits are worked on at a time, so that a step's memory is bounded whatever its rows and vocabulary.

It knows bytes and rows, not what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# What the log-probabilities of a step's prompts, or the sampling of its tokens, take at most. One row is always
# computed, however large its vocabulary.
SCRATCH_BYTES = 64 << 20
# Every operation on a GPU is a launch, so few large ones; a batch of 64 rows fits here up to a vocabulary of 131,072.
GPU_SCRATCH_BYTES = 512 << 20


def rows_at_once(row_bytes: int, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """At least one; a multiple of 16, as products are computed, where they are as many."""
    rows = max(scratch_bytes // row_bytes, 1)
    return rows - rows % 16 if rows > 16 else rows


def take_rows(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows; not copied where they follow one another."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return logits[first : first + len(rows)]
    return logits[list(rows)]
