"""What the gateway remembers of requests, for those who ask by id: a bounded history of states and times.

It does not hold prompts or texts. Where a running request is, its engine knows (see `AsyncClient.progress`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED = "queued", "processing", "completed", "failed", "cancelled"
_REMEMBERED = 1000


@dataclass
class Entry:
    id: str
    model: str
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    status: str = QUEUED
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def end(self, status: str) -> None:
        self.status, self.finished = status, time.time()


class History:
    """The running requests, and the last so many that ended."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.total = 0

    def begin(self, request_id: str, model: str) -> Entry:
        entry = self._entries[request_id] = Entry(request_id, model)
        self._entries.move_to_end(request_id)
        self.total += 1
        while len(self._entries) > self._remembered:
            self._entries.popitem(last=False)
        return entry

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def counts(self) -> dict[str, int]:
        found = dict.fromkeys((QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED), 0)
        for entry in self._entries.values():
            found[entry.status] += 1
        return found
