"""How often something that keeps failing is tried again, and how long it is left alone in between.

It knows the clock, not what fails.
"""

from __future__ import annotations

import time
from collections import deque


class Patience:
    """So many tries within a minute are free; then each waits twice as long, and in the end there is none left."""

    FREE, MOST, SECONDS = 6, 12, 60.0
    _LONGEST_PAUSE = 30.0

    def __init__(self) -> None:
        self._tries: deque[float] = deque()

    def note(self) -> None:
        """A try is being made."""
        self._tries.append(time.monotonic())

    @property
    def recent(self) -> int:
        while self._tries and time.monotonic() - self._tries[0] > self.SECONDS:
            self._tries.popleft()
        return len(self._tries)

    @property
    def pause(self) -> float:
        """How long to wait from now on until the next try is due."""
        beyond = self.recent - self.FREE
        if beyond < 0:
            return 0.0
        due = self._tries[-1] + min(2.0**beyond, self._LONGEST_PAUSE)
        return max(0.0, due - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.recent >= self.MOST
