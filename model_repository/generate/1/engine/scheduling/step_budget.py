"""Limits the prompt tokens of a step so that it takes a given time, by the measured time of previous steps.

Decoding sequences wait for the whole step, so a step with them has a shorter target than one without. This module knows
numbers of tokens and seconds, and not what is computed.
"""

from __future__ import annotations

# The budget before any measurement, and the largest change by one measurement.
_FIRST_TOKENS, _MAX_GROWTH, _MAX_SHRINKAGE = 64, 4.0, 0.5


class StepBudget:
    def __init__(self, most_tokens: int, least_tokens: int, decode_seconds: float, prefill_seconds: float) -> None:
        """The target times of a step with decoding sequences, and of one without; 0 is no limit."""
        self._most, self._least = most_tokens, min(least_tokens, most_tokens)
        self._targets = {True: decode_seconds, False: prefill_seconds}
        self._tokens = {decoding: self._first(seconds) for decoding, seconds in self._targets.items()}

    def _first(self, target: float) -> int:
        return min(max(_FIRST_TOKENS, self._least), self._most) if target else self._most

    def tokens(self, decoding: bool) -> int:
        return self._tokens[decoding]

    def record(self, decoding: bool, prompt_tokens: int, seconds: float) -> None:
        """Record the duration of a step with this many prompt tokens."""
        target, before = self._targets[decoding], self._tokens[decoding]
        # A step below its budget says nothing about a full one, unless it exceeds the target already.
        if not target or not prompt_tokens or (prompt_tokens < before and seconds <= target):
            return
        factor = target / max(seconds, 1e-9)
        fitting = int(min(prompt_tokens, before) * min(max(factor, _MAX_SHRINKAGE), _MAX_GROWTH))
        self._tokens[decoding] = min(max(fitting, self._least), self._most)
