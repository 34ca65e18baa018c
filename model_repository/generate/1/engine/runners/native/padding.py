"""Pads sizes that the kernels do not compute with zeros, which change no result: heads, and the inner size of MLPs.

This module knows matrices and the order of their rows, not what they are for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .rope import PADDING, Rope
from .unsupported import Unsupported

# The sizes of a head that attention computes (attention.hpp).
HEAD_DIMS = range(16, 256 + 16, 16)
# The kernels multiply this many inputs at a time.
INPUTS = 32


def padded(size: int) -> int:
    """The inputs of a matmul, padded."""
    return size + -size % INPUTS


@functools.cache
def padded_range(size: int) -> Sequence[int]:
    """The index of each of the padded inputs."""
    return [*range(size), *[PADDING] * (padded(size) - size)]


def is_identity(index: Sequence[int], size: int) -> bool:
    """Whether these are all of so many, in order."""
    return list(index) == list(range(size))


def take(tensor: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """tensor[index], with zeros where the index is PADDING."""
    if is_identity(index, len(tensor)):
        return tensor
    with_zeros = torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
    return with_zeros[torch.tensor([len(tensor) if i == PADDING else i for i in index])]


class HeadLayout:
    """The order of a head's dimensions in the kernels, and of the rows of all heads."""

    def __init__(self, head_dim: int, num_heads: int, ropes: Sequence[Rope]) -> None:
        """Together, the `num_heads` query heads are inputs of a matmul."""
        self._head_dim, self._ropes = head_dim, ropes
        needed = max([head_dim, *(2 * rope.half for rope in ropes)])
        size = next((size for size in HEAD_DIMS if size >= needed and num_heads * size % INPUTS == 0), None)
        if size is None:
            raise Unsupported(f"its head size is not 1 to {HEAD_DIMS[-1]}")
        self.padded = size

    def rows(self, rotating: int, plain: int = 0) -> list[int]:
        """The rows of heads that rotate (queries and keys), and below them of heads that do not (values)."""
        orders = [self._order(rotates=True)] * rotating + [self._order(rotates=False)] * plain
        return [
            PADDING if index == PADDING else head * self._head_dim + index
            for head, order in enumerate(orders)
            for index in order
        ]

    def _order(self, rotates: bool) -> list[int]:
        """For each dimension of a padded head that of the checkpoint's."""
        if rotates and self._ropes:
            return self._ropes[0].order(self._head_dim, self.padded)
        return [*range(self._head_dim), *[PADDING] * (self.padded - self._head_dim)]
