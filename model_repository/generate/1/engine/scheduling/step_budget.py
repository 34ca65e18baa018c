"""Limits the prompt tokens of a step so that it takes a given time, by the measured time of previous steps.

Decoding sequences wait for the whole step, so a step with them has a shorter target than one without, and shorter still
where steps without prompts are fast: a stream keeps its pace beside a long prompt. This module knows numbers of tokens
and seconds, and not what is computed.
"""

from __future__ import annotations

# The budget before any measurement, and the largest change by one measurement.
_FIRST_TOKENS, _MAX_GROWTH, _MAX_SHRINKAGE = 64, 4.0, 0.5
# A step with prompts and decoding sequences aims at this many times the duration of one without prompts, so that the
# longest one stays below three times; but at no less than a time that nobody notices, as short steps are slow in all.
_SLOWDOWN, _UNNOTICED_SECONDS = 1.8, 0.075
# The weight of a new measurement of steps without prompts.
_SMOOTHING = 0.1


class StepBudget:
    def __init__(self, most_tokens: int, least_tokens: int, decode_seconds: float, prefill_seconds: float) -> None:
        """The target times of a step with decoding sequences, and of one without; 0 is no limit."""
        self._most, self._least = most_tokens, min(least_tokens, most_tokens)
        self._targets = {True: decode_seconds, False: prefill_seconds}
        self._decode_seconds = 0.0
        self._tokens = {decoding: self._first(seconds) for decoding, seconds in self._targets.items()}

    def _first(self, target: float) -> int:
        return min(max(_FIRST_TOKENS, self._least), self._most) if target else self._most

    def tokens(self, decoding: bool) -> int:
        return self._tokens[decoding]

    @property
    def decode_seconds(self) -> float:
        """The duration of a step without prompts; 0 before the first one."""
        return self._decode_seconds

    def record(self, decoding: bool, prompt_tokens: int, seconds: float) -> None:
        """Record the duration of a step with this many prompt tokens."""
        if decoding and not prompt_tokens:
            change = seconds - self._decode_seconds
            self._decode_seconds += change * (_SMOOTHING if self._decode_seconds else 1.0)
        target, before = self._target(decoding), self._tokens[decoding]
        # A step below its budget says nothing about a full one, unless it exceeds the target already.
        if not target or not prompt_tokens or (prompt_tokens < before and seconds <= target):
            return
        factor = target / max(seconds, 1e-9)
        fitting = int(min(prompt_tokens, before) * min(max(factor, _MAX_SHRINKAGE), _MAX_GROWTH))
        self._tokens[decoding] = min(max(fitting, self._least), self._most)

    def _target(self, decoding: bool) -> float:
        target = self._targets[decoding]
        if not decoding or not self._decode_seconds:
            return target
        return min(target, max(_SLOWDOWN * self._decode_seconds, _UNNOTICED_SECONDS))
