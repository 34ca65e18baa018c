"""Limits how many rows of logits are processed at a time, so that a step's memory is bounded.

This module knows bytes and rows, and not what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .transfer import row_index

# The most memory that the log-probabilities of a step's prompts, or the sampling of its tokens, may take. One row is
# always processed, however large its vocabulary.
SCRATCH_BYTES = 64 << 20
# On a GPU every operation is a kernel launch, so groups are large. 64 rows fit up to a vocabulary of 131,072.
GPU_SCRATCH_BYTES = 512 << 20


def rows_at_once(row_bytes: int, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """At least one row; above 16 a multiple of 16, the tile height of the GEMM kernels."""
    rows = max(scratch_bytes // row_bytes, 1)
    return rows - rows % 16 if rows > 16 else rows


def take_rows(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows; a view where they are contiguous."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return logits[first : first + len(rows)]
    return logits[row_index(rows, logits.device)]
