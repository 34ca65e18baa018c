"""Speculative decoding by prompt lookup: draft tokens from a request's own text, where its last tokens occurred before.

Plain Python. A draft token costs one more row in the next step. It is accepted only if the sampler samples that very
token, so texts are the same with and without drafts. `PromptLookup` adapts the number of draft tokens to the acceptance
of one request. `SpeculationGate` measures whether drafts save time at all. They know neither scheduling nor sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

# Lengths of the n-grams to look up, the longest first.
_NGRAMS = (3, 2)
_FIRST_DRAFT_LENGTH, _LONGEST_BACKOFF = 2, 64
# Each cycle of steps begins with this many trial steps with drafts and as many without; older measurements decay.
_CYCLE_STEPS, _TRIAL_STEPS, _DECAY = 128, 8, 0.7


class SpeculationGate:
    """Decides by measured throughput, for each batch size, whether the next step has draft tokens."""

    def __init__(self) -> None:
        self._steps: defaultdict[int, int] = defaultdict(int)
        # [tokens, seconds] by batch size: of steps without drafts, and of steps with drafts.
        self._measured: defaultdict[int, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0], [0.0, 0.0]])

    def is_open(self, batch_size: int) -> bool:
        """Whether the next step of this batch size has draft tokens."""
        step = self._steps[batch_size] % _CYCLE_STEPS
        if step < 2 * _TRIAL_STEPS:
            return step < _TRIAL_STEPS
        (tokens, seconds), (draft_tokens, draft_seconds) = self._measured[batch_size]
        return draft_tokens * seconds >= tokens * draft_seconds

    def record(self, batch_size: int, with_drafts: bool, tokens: float, seconds: float) -> None:
        """Record how many tokens a step generated, and its duration."""
        self._steps[batch_size] += 1
        measured = self._measured[batch_size]
        if self._steps[batch_size] % _CYCLE_STEPS == 1:
            measured[:] = [[_DECAY * number for number in mode] for mode in measured]
        measured[with_drafts][0] += tokens
        measured[with_drafts][1] += seconds


class PromptLookup:
    """Proposes draft tokens for one request."""

    def __init__(self, max_draft_tokens: int) -> None:
        self._max_length = max_draft_tokens
        # The latest end of each n-gram, and the number of tokens that are indexed.
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._length = min(_FIRST_DRAFT_LENGTH, max_draft_tokens)
        self._backoff, self._backoff_until = 1, 0

    def propose(self, ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """At most `limit` draft tokens that may follow these ids; often none."""
        self._index(ids)
        count = min(limit, self._length)
        if count <= 0 or len(ids) < self._backoff_until:
            return ()
        for length in _NGRAMS:
            if (end := self._ends.get(tuple(ids[-length:]))) is not None:
                return tuple(_continuation(ids, end, count))
        return ()

    def record(self, proposed: int, accepted: int) -> None:
        """Adapt the draft length to how many tokens of the last draft were accepted."""
        if accepted == proposed:
            self._length = min(2 * self._length, self._max_length)
            self._backoff = 1
        elif accepted:
            self._length = accepted
            self._backoff = 1
        else:
            self._length = 1
            self._backoff_until = self._indexed + self._backoff
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)

    def _index(self, ids: Sequence[int]) -> None:
        # The n-gram at the very end is the one to look up. It is indexed when another token follows.
        for end in range(max(self._indexed, 1), len(ids)):
            for length in _NGRAMS:
                if end >= length:
                    self._ends[tuple(ids[end - length : end])] = end
        self._indexed = len(ids)


def _continuation(ids: Sequence[int], start: int, count: int) -> list[int]:
    """The tokens from `start` on. Beyond the end of the text it repeats itself, so the copied tokens continue it."""
    tokens: list[int] = []
    for index in range(start, start + count):
        tokens.append(ids[index] if index < len(ids) else tokens[index - len(ids)])
    return tokens
