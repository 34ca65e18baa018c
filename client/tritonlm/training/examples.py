"""Training examples as two arrays, token ids and labels, padded on the right. It does not know text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

# The label that the loss ignores.
IGNORED = -100

Ids = npt.NDArray[np.int32]


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Rows of equal length. A batch is cut to its longest row; causal attention needs no mask for the padding."""

    def __init__(self, ids: Ids, labels: Ids) -> None:
        assert ids.shape == labels.shape
        self.ids, self.labels = ids, labels
        self.lengths = (labels != IGNORED).shape[1] - (labels != IGNORED)[:, ::-1].argmax(axis=1)

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Examples:
        """From token ids; the first `prompt_lengths[i]` tokens of sequence `i` are the prompt, without labels."""
        longest = max(len(sequence) for sequence in sequences)
        ids = np.zeros((len(sequences), longest), np.int32)
        labels = np.full((len(sequences), longest), IGNORED, np.int32)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            labels[row, prompt_lengths[row] : len(sequence)] = sequence[prompt_lengths[row] :]
        return cls(ids, labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indexes: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch: the data loader calls this method when it exists."""
        rows = np.asarray(indexes)
        length = int(self.lengths[rows].max())
        return {
            "input_ids": torch.from_numpy(self.ids[rows, :length].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[rows, :length].astype(np.int64)),
        }


def identity_collator(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A collator that does nothing: `Examples` already returns whole batches."""
    return batch
