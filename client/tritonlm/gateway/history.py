"""A bounded history of requests, with their states and times, for queries by id.

It holds no prompts or texts. The progress of a running request comes from its engine (`AsyncClient.progress`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from tritonlm.client.request_fields import MAX_MODEL_NAME

QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED = "queued", "processing", "completed", "failed", "cancelled"
_CAPACITY = 1000


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
    """The latest requests, running and ended."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.total = 0

    def begin(self, request_id: str, model: str) -> Entry:
        entry = self._entries[request_id] = Entry(request_id, model[:MAX_MODEL_NAME])
        self._entries.move_to_end(request_id)
        self.total += 1
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return entry

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def counts(self) -> dict[str, int]:
        counts = dict.fromkeys((QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED), 0)
        for entry in self._entries.values():
            counts[entry.status] += 1
        return counts
