"""Training examples as two arrays, token ids and labels, padded on the right. It knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

# What the loss passes over.
IGNORED = -100

Ids = npt.NDArray[np.int32]


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Rows of equal length. A batch is cut to its longest row; whoever attends causally needs no mask for the rest."""

    def __init__(self, ids: Ids, labels: Ids) -> None:
        assert ids.shape == labels.shape
        self.ids, self.labels = ids, labels
        self.lengths = (labels != IGNORED).shape[1] - (labels != IGNORED)[:, ::-1].argmax(axis=1)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], prompts: Sequence[int]) -> Examples:
        """From token ids; the first `prompts[i]` of a sequence are given, not learnt."""
        longest = max(len(sequence) for sequence in sequences)
        ids = np.zeros((len(sequences), longest), np.int32)
        labels = np.full((len(sequences), longest), IGNORED, np.int32)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            labels[row, prompts[row] : len(sequence)] = sequence[prompts[row] :]
        return cls(ids, labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indexes: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once: the data loader asks so where it can."""
        chosen = np.asarray(indexes)
        length = int(self.lengths[chosen].max())
        return {
            "input_ids": torch.from_numpy(self.ids[chosen, :length].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[chosen, :length].astype(np.int64)),
        }


def as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In place of collating: `Examples` gives whole batches."""
    return batch
