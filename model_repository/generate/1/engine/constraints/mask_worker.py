"""Computes the token masks of a step's constrained sequences on threads of its own, while the model computes the step.

It knows constraints and bits, and neither logits nor requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tritonlm.contract import TritonLMError

from .constraint import Constraint, Words

# Imported with the first constraint: an engine that gets none runs without it.
if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

# More threads than this do not pay: a mask takes some microseconds.
_MOST_THREADS = 4


@dataclass
class StepMasks:
    """The masks of a step: row n of `words` has bit i % 32 of word i // 32 set if token i may come."""

    words: Words
    # The first row of each constraint; the rows after it follow its draft tokens.
    first_rows: dict[Constraint, int]
    # Rows after which nothing but the end may come.
    ends: set[int] = field(default_factory=set)
    # The errors of rows that cannot go on. That of a row after draft tokens counts only if they are accepted.
    errors: dict[int, TritonLMError] = field(default_factory=dict)


class _Row(NamedTuple):
    """A mask to compute: of a constraint after so many draft tokens, which its matcher has consumed."""

    constraint: Constraint
    offset: int
    matcher: LLMatcher


class MaskWorker:
    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, sequences: Sequence[tuple[Constraint, Sequence[int]]]) -> Future[StepMasks]:
        """Compute the masks of these constraints, and those after each of their draft tokens."""
        first_rows: dict[Constraint, int] = {}
        rows: list[_Row] = []
        for constraint, draft_tokens in sequences:
            first_rows[constraint] = len(rows)
            rows += [_Row(constraint, n, matcher) for n, matcher in enumerate(constraint.copies(draft_tokens))]
        masks = StepMasks(np.empty((len(rows), sequences[0][0].mask_words), np.int32), first_rows)
        return self._thread.submit(self._compute, rows, masks)

    def close(self) -> None:
        self._thread.shutdown()

    def _compute(self, rows: Sequence[_Row], masks: StepMasks) -> StepMasks:
        if self._executor is None:
            from llguidance import LLExecutor  # noqa: PLC0415

            threads = max(1, min(len(os.sched_getaffinity(0)) // 2, _MOST_THREADS))
            self._executor = LLExecutor(num_threads=threads)
        count, words = masks.words.shape
        matchers = [(row.matcher, index) for index, row in enumerate(rows)]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.words.ctypes.data, words * 4, count)
        self._clear_beyond_vocabulary(masks.words)
        for index, row in enumerate(rows):
            try:
                if not row.constraint.limit(row.matcher, masks.words[index], row.offset):
                    masks.ends.add(index)
            except TritonLMError as error:
                masks.errors[index] = error
        return masks

    def _clear_beyond_vocabulary(self, words: Words) -> None:
        """A tokenizer may know tokens for which the model has no logits."""
        whole, bits = divmod(self._vocab_size, 32)
        if whole < words.shape[1]:
            words[:, whole] &= np.int32((1 << bits) - 1)
            words[:, whole + 1 :] = 0
