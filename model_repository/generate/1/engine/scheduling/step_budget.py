"""How many prompt tokens a step may compute so that it takes a given time, from what the steps before took.

Streams that decode wait for the whole step, so a step with them has less time than one without. It knows numbers of
tokens and seconds, and not what is computed.
"""

from __future__ import annotations

# Before anything was measured, and by how much one measurement may raise or lower it.
_FIRST_TOKENS, _MOST_GROWTH, _MOST_SHRINKAGE = 64, 4.0, 0.5


class StepBudget:
    def __init__(self, most_tokens: int, least_tokens: int, decode_seconds: float, prefill_seconds: float) -> None:
        """The times are those of a step with sequences that decode, and of one without; 0 is no limit."""
        self._most, self._least = most_tokens, min(least_tokens, most_tokens)
        self._targets = {True: decode_seconds, False: prefill_seconds}
        self._tokens = {decoding: self._first(seconds) for decoding, seconds in self._targets.items()}

    def _first(self, target: float) -> int:
        return min(max(_FIRST_TOKENS, self._least), self._most) if target else self._most

    def tokens(self, decoding: bool) -> int:
        return self._tokens[decoding]

    def note(self, decoding: bool, prompt_tokens: int, seconds: float) -> None:
        """A step with this many prompt tokens took so long."""
        target, before = self._targets[decoding], self._tokens[decoding]
        # A step that was not filled tells nothing of what a full one takes, unless it was too long already.
        if not target or not prompt_tokens or (prompt_tokens < before and seconds <= target):
            return
        factor = target / max(seconds, 1e-9)
        fitting = int(min(prompt_tokens, before) * min(max(factor, _MOST_SHRINKAGE), _MOST_GROWTH))
        self._tokens[decoding] = min(max(fitting, self._least), self._most)
