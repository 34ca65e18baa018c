"""Restart backoff: how often a failing process is restarted, and how long to wait before each restart.

It knows the clock. It does not know what is restarted.
"""

from __future__ import annotations

import time

from tritonlm.contract.backoff import doubled


class RestartBackoff:
    """The first restarts in a row are immediate; each later one waits twice as long, up to a maximum number.

    A process that stays up for HEALTHY_SECONDS after a restart resets the count.
    """

    IMMEDIATE_ATTEMPTS, MAX_ATTEMPTS, HEALTHY_SECONDS = 6, 12, 15.0
    _MAX_DELAY = 30.0

    def __init__(self) -> None:
        self._attempts = 0
        self._last_attempt = float("-inf")

    def record_attempt(self) -> None:
        """Record that a restart begins now."""
        self._attempts = self.consecutive_attempts + 1
        self._last_attempt = time.monotonic()

    @property
    def consecutive_attempts(self) -> int:
        uptime = time.monotonic() - self._last_attempt - self._delay_after(self._attempts)
        return 0 if uptime > self.HEALTHY_SECONDS else self._attempts

    @property
    def delay(self) -> float:
        """Seconds from now until the next restart is allowed."""
        return max(0.0, self._last_attempt + self._delay_after(self.consecutive_attempts) - time.monotonic())

    @property
    def is_exhausted(self) -> bool:
        return self.consecutive_attempts >= self.MAX_ATTEMPTS

    def _delay_after(self, attempts: int) -> float:
        if attempts < self.IMMEDIATE_ATTEMPTS:
            return 0.0
        return doubled(1.0, attempts - self.IMMEDIATE_ATTEMPTS, self._MAX_DELAY)
