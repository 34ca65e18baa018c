"""Guesses at a request's next tokens from its own text: where its last tokens stood before, what followed them then.

Plain Python. A guess costs a row of the next step, and is taken only where the sampler then draws that very token:
texts are those of no guesses. Whoever guesses wrong guesses less, and rests; and where all guesses together cost more
time than they save, none are made. It knows neither scheduling nor sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

# So many last tokens are looked for, the longer run first.
_RUNS = (3, 2)
_FIRST_TRUST, _LONGEST_REST = 2, 64
# Of so many steps so many are made each way; what was seen longer ago counts for less.
_CYCLE, _TRIED, _FADING = 128, 8, 0.7


class Trial:
    """Whether guessing pays, by the clock, for each number of requests at once: both ways are tried."""

    def __init__(self) -> None:
        self._steps: defaultdict[int, int] = defaultdict(int)
        # Tokens and seconds, without guesses and with them.
        self._seen: defaultdict[int, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0], [0.0, 0.0]])

    def wants(self, crowd: int) -> bool:
        """Whether the next step of so many requests is to hold guesses."""
        step = self._steps[crowd] % _CYCLE
        if step < 2 * _TRIED:
            return step < _TRIED
        (tokens, seconds), (more_tokens, more_seconds) = self._seen[crowd]
        return more_tokens * seconds >= tokens * more_seconds

    def note(self, crowd: int, guessing: bool, tokens: float, seconds: float) -> None:
        """What the step of `wants` gave, and how long it took."""
        self._steps[crowd] += 1
        seen = self._seen[crowd]
        if self._steps[crowd] % _CYCLE == 1:
            seen[:] = [[_FADING * number for number in way] for way in seen]
        seen[guessing][0] += tokens
        seen[guessing][1] += seconds


class Lookup:
    def __init__(self, most: int) -> None:
        """`most`: no more tokens at once."""
        self._most = most
        # Where each run of tokens ended last, and up to where that has been written down.
        self._ends: dict[tuple[int, ...], int] = {}
        self._learned = 0
        self._trust = min(_FIRST_TRUST, most)
        self._rest, self._rests_until = 1, 0

    def guess(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """What may follow these, at most `room` tokens; often nothing."""
        self._learn(ids)
        count = min(room, self._trust)
        if count <= 0 or len(ids) < self._rests_until:
            return ()
        for run in _RUNS:
            if (end := self._ends.get(tuple(ids[-run:]))) is not None:
                return tuple(_repeated(ids, end, count))
        return ()

    def judge(self, guessed: int, right: int) -> None:
        """How the last guess turned out."""
        if right == guessed:
            self._trust = min(2 * self._trust, self._most)
            self._rest = 1
        elif right:
            self._trust = right
            self._rest = 1
        else:
            self._trust = 1
            self._rests_until = self._learned + self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)

    def _learn(self, ids: Sequence[int]) -> None:
        # The last token ends the run that is looked for: it is learned when another one has come.
        for end in range(max(self._learned, 1), len(ids)):
            for run in _RUNS:
                if end >= run:
                    self._ends[tuple(ids[end - run : end])] = end
        self._learned = len(ids)


def _repeated(ids: Sequence[int], start: int, count: int) -> list[int]:
    """What stands from there on; and where the text ends, the same again: a short run may repeat itself."""
    found: list[int] = []
    for place in range(start, start + count):
        found.append(ids[place] if place < len(ids) else found[place - len(ids)])
    return found
