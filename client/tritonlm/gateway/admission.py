"""How many requests are inside at once: beyond the bound the next is refused before any work, and told when to return.

Where places are scarce each caller has its share, so that one cannot keep the others out. It counts; it does not know
what requests are.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque

from tritonlm.contract import Draining, QueueFull

# Over how long the rate at which requests end is measured.
_RATE_SECONDS = 10.0
_LONGEST_RETRY_SECONDS = 60
# Who has asked so lately shares the places with the others.
_ACTIVE_SECONDS = 5.0
# Below this part of the places nobody is refused for having many.
_PLENTY = 0.5


class Admission:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside: Counter[str] = Counter()
        self.closed = False
        self._asked: dict[str, float] = {}
        self._ended: deque[float] = deque(maxlen=10_000)

    @property
    def total(self) -> int:
        return self.inside.total()

    def close(self) -> None:
        """From now on nobody comes in."""
        self.closed = True

    def enter(self, caller: str) -> None:
        if self.closed:
            raise Draining("this server is being stopped; send the request elsewhere or later")
        now, total = time.monotonic(), self.total
        self._asked[caller] = now
        if total >= self.limit:
            raise self._refusal(f"{total} requests run or wait already")
        if total >= self.limit * _PLENTY and self.inside[caller] >= self._share(now):
            raise self._refusal("places are scarce, and you have your share of them")
        self.inside[caller] += 1

    def leave(self, caller: str) -> None:
        self.inside[caller] -= 1
        if not self.inside[caller]:
            del self.inside[caller]
        self._ended.append(time.monotonic())

    def _refusal(self, why: str) -> QueueFull:
        seconds = self.retry_after()
        error = QueueFull(f"{why}; retry after {seconds} s")
        error.retry_after = seconds
        return error

    def retry_after(self) -> int:
        """In about how many seconds a place will be free, at the rate at which requests have ended lately."""
        now = time.monotonic()
        ended = sum(now - moment <= _RATE_SECONDS for moment in self._ended)
        if not ended:
            return 1
        return min(_LONGEST_RETRY_SECONDS, max(1, math.ceil((self.total - self.limit + 1) * _RATE_SECONDS / ended)))

    def _share(self, now: float) -> int:
        """Of the places, what is due to each of those who ask."""
        active = [name for name, asked in self._asked.items() if now - asked <= _ACTIVE_SECONDS]
        self._asked = {name: self._asked[name] for name in {*active, *self.inside} & self._asked.keys()}
        return max(1, self.limit // max(1, len(self._asked)))
