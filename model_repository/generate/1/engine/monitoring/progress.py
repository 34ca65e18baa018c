"""How far an engine has come: a counter that whatever computes advances, and how long it has stood still.

The kernels advance it in C++ while the GIL is free, hooks for Hugging Face's code, the engine for the rest. A
process whose counter moves is slow at most; one that has work and whose counter stands still is hung. It does not know
what is computed, nor who reads it.
"""

from __future__ import annotations

import ctypes
import time


class Progress:
    def __init__(self) -> None:
        # The kernels' part of it, which they reach by its address.
        self._computed = ctypes.c_uint64()
        self._noted = 0
        self._working_since: float | None = None
        self._seen, self._seen_at = 0, time.monotonic()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._computed)

    @property
    def count(self) -> int:
        return self._computed.value + self._noted

    def note(self) -> None:
        """Something has been done, by whoever runs Python code."""
        self._noted += 1

    def begin(self) -> None:
        """Work begins; until it ends the counter has to move."""
        self._noted += 1
        self._working_since = time.monotonic()

    def end(self) -> None:
        self._noted += 1
        self._working_since = None

    def still_seconds(self) -> float:
        """For how long work has been under way without progress, as far as readers have seen, who come again."""
        now, count, since = time.monotonic(), self.count, self._working_since
        if count != self._seen or since is None:
            self._seen, self._seen_at = count, now
        return 0.0 if since is None else now - max(self._seen_at, since)

    def working_seconds(self) -> float:
        """How long the step under way has taken so far."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since
