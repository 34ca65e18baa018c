"""The adapters for which there was no room: how long each waits, and which others may no longer overtake it.

It knows sources, times and sizes, and neither threads nor what fits: the store's lock guards it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .folders import AdapterSource

# Loads of others may overtake one that has been put aside for so long.
_OVERTAKEN_SECONDS = 5.0


@dataclass(eq=False)
class _Waiting:
    since: float
    needed: int
    # Whether it is about to be tried again.
    retried: bool = False


class PutAside:
    def __init__(self, queue_seconds: float, clock: Callable[[], float]) -> None:
        # After queue_seconds its first requests have been refused: it must not hold everybody up for ever.
        self._longest, self._clock = queue_seconds or math.inf, clock
        # The first one first.
        self._waiting: dict[AdapterSource, _Waiting] = {}

    def put(self, source: AdapterSource, needed: int) -> None:
        """Put it aside, or again if it was before."""
        waiting = self._waiting.setdefault(source, _Waiting(self._clock(), needed))
        waiting.needed, waiting.retried = needed, False

    def remove(self, source: AdapterSource) -> None:
        self._waiting.pop(source, None)

    def retry(self, has_room: Callable[[AdapterSource, int], bool]) -> list[AdapterSource]:
        """Those that are to be tried again, each once until it is put aside again."""
        fitting = [
            (source, waiting)
            for source, waiting in self._waiting.items()
            if not waiting.retried and has_room(source, waiting.needed)
        ]
        for _, waiting in fitting:
            waiting.retried = True
        return [source for source, _ in fitting]

    def gives_way(self, source: AdapterSource) -> bool:
        """Whether this one may not overtake one that has waited longer."""
        now = self._clock()
        since = self._waiting[source].since if source in self._waiting else now
        earlier = [waiting.since for waiting in self._waiting.values() if waiting.since < since]
        return any(_OVERTAKEN_SECONDS <= now - begun < self._longest for begun in earlier)
