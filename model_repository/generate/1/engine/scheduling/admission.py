"""The admission queue: limits how many requests are in the engine, and rejects new ones while the model stops.

It counts requests and knows nothing else of them. Its caller holds the lock.
"""

from __future__ import annotations

import time

from tritonlm.contract import Draining, NotLoaded, QueueFull

# The gateway repeats `retire` until the last request has ended. If the gateway dies, the model serves again after this.
RETIRED_SECONDS = 10.0


class AdmissionQueue:
    def __init__(self, slots: int, queue_size: int) -> None:
        self._slots, self._queue_size = slots, queue_size
        self.in_flight = 0
        self._draining = self._closed = False
        self._retired_until = 0.0
        self._last_left = time.monotonic()

    def enter(self, resumed: bool = False) -> None:
        """Count one more request, or raise the error that rejects it.

        A resumed request was admitted before a fault interrupted it, so it may still end while the model drains.
        """
        if self._closed or (self._draining and not resumed):
            raise Draining("this model is being stopped; send the request elsewhere or later")
        if self.is_retired:
            raise NotLoaded("this model is being unloaded; send the request again in a moment", "model")
        if self.in_flight >= self._slots + self._queue_size:
            raise QueueFull(f"Exceeds maximum queue size: {self._queue_size} requests wait already; retry")
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
        self._last_left = time.monotonic()

    def drain(self) -> None:
        self._draining = True

    def close(self) -> None:
        self._draining = self._closed = True

    def retire(self) -> None:
        self._retired_until = time.monotonic() + RETIRED_SECONDS

    @property
    def is_retired(self) -> bool:
        return time.monotonic() < self._retired_until

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request left; 0 while there are requests."""
        return 0.0 if self.in_flight else time.monotonic() - self._last_left
