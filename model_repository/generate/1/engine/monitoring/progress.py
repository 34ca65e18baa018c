"""The progress counter of an engine: it tells a slow engine from a hung one.

The kernels advance it in C++ while the GIL is free, hooks advance it in Hugging Face's code, and the engine elsewhere.
A process whose counter moves is at most slow. One that works while its counter stands still is hung. This module does
not know what is computed, nor who reads the counter.
"""

from __future__ import annotations

import ctypes
import time


class Progress:
    def __init__(self) -> None:
        # The part that the kernels advance, through its address.
        self._native_count = ctypes.c_uint64()
        self._python_count = 0
        self._working_since: float | None = None
        self._seen_count, self._seen_at = 0, time.monotonic()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._native_count)

    @property
    def count(self) -> int:
        return self._native_count.value + self._python_count

    def advance(self) -> None:
        """Count a unit of work of Python code."""
        self._python_count += 1

    def begin(self) -> None:
        """Note that a step begins. Until it ends the counter has to move."""
        self._python_count += 1
        self._working_since = time.monotonic()

    def end(self) -> None:
        self._python_count += 1
        self._working_since = None

    def still_seconds(self) -> float:
        """How long the step has made no progress, as far as previous calls have observed."""
        now, count, since = time.monotonic(), self.count, self._working_since
        if count != self._seen_count or since is None:
            self._seen_count, self._seen_at = count, now
        return 0.0 if since is None else now - max(self._seen_at, since)

    def working_seconds(self) -> float:
        """How long the current step runs already; 0 without one."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since
