"""How often something that keeps failing is tried again, and how long it is left alone in between.

It knows the clock, not what fails.
"""

from __future__ import annotations

import time


class Patience:
    """So many tries in a row are free; then each waits twice as long, and in the end there is none left.

    What has lived for a while after a try has not failed in a row.
    """

    FREE, MOST, LIVED_SECONDS = 6, 12, 15.0
    _LONGEST_PAUSE = 30.0

    def __init__(self) -> None:
        self._tries = 0
        self._last = float("-inf")

    def note(self) -> None:
        """A try is being made."""
        self._tries = self.in_a_row + 1
        self._last = time.monotonic()

    @property
    def in_a_row(self) -> int:
        lived = time.monotonic() - self._last - self._pause_after(self._tries)
        return 0 if lived > self.LIVED_SECONDS else self._tries

    @property
    def pause(self) -> float:
        """How long to wait from now on until the next try is due."""
        return max(0.0, self._last + self._pause_after(self.in_a_row) - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.in_a_row >= self.MOST

    def _pause_after(self, tries: int) -> float:
        return 0.0 if tries < self.FREE else min(2.0 ** (tries - self.FREE), self._LONGEST_PAUSE)
