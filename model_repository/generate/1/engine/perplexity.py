"""The perplexity of a model on a text: exp of the mean negative log-probability of its tokens.

The text is read in windows, each without what came before it; of a window's tokens all but the first count. This module
knows a runner and token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .runners.interface import Runner
from .scheduling.scheduler import Slice

# Tokens of a window, where the model has a context of so many; and of a step.
WINDOW = 2048
_STEP = 512


@dataclass(frozen=True)
class _Window:
    """What a runner reads of a request."""

    ids: Sequence[int]
    table: _Table
    needs_every_row: bool = True
    embeds: bool = False
    adapter: None = None


@dataclass(frozen=True)
class _Table:
    blocks: Sequence[int]


def perplexity(runner: Runner, ids: Sequence[int], progress: Callable[[int, int], None]) -> float:
    """Of at least two ids."""
    window = min(WINDOW, runner.context_length)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window - 1):
        progress(start, len(ids))
        part = ids[start : start + window]
        total += float(log_probabilities(runner, part).double().sum())
        count += len(part) - 1
    return math.exp(-total / count)


def log_probabilities(runner: Runner, ids: Sequence[int]) -> torch.Tensor:
    """Of each of a window's tokens but the first."""
    # Block 0 is the padding block.
    sequence: Any = _Window(ids, _Table(range(1, runner.blocks)))
    found = []
    for start in range(0, len(ids) - 1, _STEP):
        count = min(_STEP, len(ids) - 1 - start)
        computed = runner.forward([Slice(sequence, start, count)])
        first = start + 1
        for logits in runner.project(computed, range(count)):
            found.append(runner.score(logits, range(len(logits)), ids[first : first + len(logits)], 0).own)
            first += len(logits)
    return torch.cat(found)
