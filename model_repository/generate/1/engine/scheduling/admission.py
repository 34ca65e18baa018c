"""Who may come in: while there is a place in the line, and while the model is neither being stopped nor retired.

It counts and refuses. Its caller holds the lock; what becomes of a request inside it does not know.
"""

from __future__ import annotations

import time

from tritonlm.contract import Draining, NotLoaded, QueueFull

# A retirement is renewed by whoever waits for the last request's end. Where he dies, the model serves again.
RETIRED_SECONDS = 10.0


class Door:
    def __init__(self, places: int, queue: int) -> None:
        self._places, self._queue = places, queue
        self.inside = 0
        self._draining = self._closed = False
        self._retired_until = 0.0
        self._last_left = time.monotonic()

    def enter(self, goes_on: bool = False) -> None:
        """Count one more, or raise why it must stay outside. One that goes on with what a fault has interrupted was let
        in before: it may end while the model is being stopped."""
        if self._closed or (self._draining and not goes_on):
            raise Draining("this model is being stopped; send the request elsewhere or later")
        if self.is_retired:
            raise NotLoaded("this model is being unloaded; send the request again in a moment", "model")
        if self.inside >= self._places + self._queue:
            raise QueueFull(f"Exceeds maximum queue size: {self._queue} requests wait already; retry")
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1
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
        """How long nobody has been inside."""
        return 0.0 if self.inside else time.monotonic() - self._last_left
