"""Training examples as arrays, token ids and labels, padded on the right. It does not know text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

# The label that the loss ignores.
IGNORED = -100

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """Token ids and their labels, which are the ids themselves, or IGNORED."""

    ids: Sequence[int]
    labels: Sequence[int]

    @classmethod
    def after(cls, prompt_length: int, ids: Sequence[int]) -> Example:
        """The first `prompt_length` ids are the prompt, without labels."""
        return cls(ids, [*[IGNORED] * prompt_length, *ids[prompt_length:]])


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Rows of equal length. A batch is cut to its longest row; causal attention needs no mask for the padding.

    With `positions` a row holds several examples, one behind the other; each begins at position 0.
    """

    def __init__(self, ids: Ids, labels: Ids, positions: Ids | None = None) -> None:
        assert ids.shape == labels.shape
        assert positions is None or positions.shape == ids.shape
        self.ids, self.labels, self.positions = ids, labels, positions
        self.lengths = (labels != IGNORED).shape[1] - (labels != IGNORED)[:, ::-1].argmax(axis=1)

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Examples:
        """From token ids; the first `prompt_lengths[i]` tokens of sequence `i` are the prompt, without labels."""
        return cls.padded([Example.after(*pair) for pair in zip(prompt_lengths, sequences, strict=True)])

    @classmethod
    def padded(cls, examples: Sequence[Example]) -> Examples:
        """A row for each example."""
        ids, labels = _empty_rows(len(examples), max(len(example.ids) for example in examples))
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = example.ids
            labels[row, : len(example.ids)] = example.labels
        return cls(ids, labels)

    @classmethod
    def packed(cls, examples: Sequence[Example], length: int) -> Examples:
        """Rows of at most `length` tokens, each with as many examples as fit."""
        rows = _rows_of([len(example.ids) for example in examples], length)
        ids, labels = _empty_rows(len(rows), length)
        positions = np.zeros_like(ids)
        for row, indexes in enumerate(rows):
            start = 0
            for example in (examples[index] for index in indexes):
                end = start + len(example.ids)
                ids[row, start:end], labels[row, start:end] = example.ids, example.labels
                # The token before belongs to another example and must not predict it.
                labels[row, start] = IGNORED
                positions[row, start:end] = np.arange(end - start)
                start = end
        return cls(ids, labels, positions)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indexes: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch: the data loader calls this method when it exists."""
        rows = np.asarray(indexes)
        length = int(self.lengths[rows].max())
        arrays = {"input_ids": self.ids, "labels": self.labels}
        if self.positions is not None:
            arrays["position_ids"] = self.positions
        return {name: torch.from_numpy(array[rows, :length].astype(np.int64)) for name, array in arrays.items()}


def _empty_rows(count: int, length: int) -> tuple[Ids, Ids]:
    return np.zeros((count, length), np.int32), np.full((count, length), IGNORED, np.int32)


def _rows_of(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Which examples share a row: the longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    # The rows with this many tokens of room.
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = next((room for room in range(lengths[index], row_length) if by_room[room]), row_length)
        if room == row_length:
            rows.append([])
        row = by_room[room].pop() if room < row_length else len(rows) - 1
        rows[row].append(index)
        by_room[room - lengths[index]].append(row)
    return rows


def identity_collator(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A collator that does nothing: `Examples` already returns whole batches."""
    return batch
