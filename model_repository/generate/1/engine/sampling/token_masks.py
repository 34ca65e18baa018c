"""Which tokens the rows of logits may sample, as bits. A token that is not allowed counts as one of logit -infinity.

It does not know why a token is not allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .transfer import to_device

WORD_BITS = 32
Words = npt.NDArray[np.int32]
# The index of a row without a mask.
NO_MASK = -1


def word_count(vocab_size: int) -> int:
    return -(-vocab_size // WORD_BITS)


@dataclass(frozen=True)
class TokenMasks:
    """Row n may sample token i if bit i % 32 of words[index[n], i // 32] is set; with NO_MASK it may sample any."""

    words: Words
    index: Sequence[int]

    def take(self, rows: Sequence[int]) -> TokenMasks:
        """The masks of these rows."""
        return TokenMasks(self.words, [self.index[row] for row in rows])

    def masks(self, row: int) -> bool:
        return self.index[row] != NO_MASK

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The rows of logits with -infinity for each token that is not allowed."""
        index = np.asarray(self.index)
        rows = np.where(index[:, None] == NO_MASK, np.int32(-1), self.words[index])
        words = to_device(rows, torch.int32, logits.device)
        bits = words[:, :, None] >> torch.arange(WORD_BITS, device=logits.device, dtype=torch.int32) & 1
        return logits.masked_fill(bits.flatten(1)[:, : logits.shape[-1]] == 0, -torch.inf)
