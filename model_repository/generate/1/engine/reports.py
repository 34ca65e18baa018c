"""What an engine tells of itself: its state for callers, its measures for the metrics, where a request is.

It reads the other rooms and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from .config import EngineConfig
from .door import Door
from .metrics import Metrics
from .model_runner import Runner
from .scheduler import Scheduler

# What `status` tells of what was counted: whole numbers.
COUNTERS = (
    "requests", "finished", "cancelled", "timed_out", "failed", "refused", "steps", "prompt_tokens", "generated_tokens",
    "cached_tokens",
)  # fmt: skip


class Reports:
    def __init__(
        self, runner: Runner, config: EngineConfig, scheduler: Scheduler, door: Door, metrics: Metrics
    ) -> None:
        self._runner, self._config, self._scheduler, self._pool = runner, config, scheduler, scheduler.pool
        self._door, self._metrics = door, metrics
        self._created, self._born = int(time.time()), time.monotonic()

    def status(self) -> dict[str, Any]:
        return {
            **{name: int(self._metrics.counted[name]) for name in COUNTERS},
            "tokens_per_second": round(self._metrics.generated.each_second(time.monotonic()), 1),
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "draining": self._door.is_draining,
            "retired": self._door.is_retired,
            "idle_seconds": round(self._door.idle_seconds, 3),
            "idle_unload_seconds": self._config.idle_unload_seconds,
            "memory_bytes": self._runner.memory_bytes,
            "memory_budget": self._config.memory_budget,
            "created": self._created,
            "age_seconds": round(time.monotonic() - self._born, 3),
            "places": self._config.max_sequences,
            "preemptions": self._scheduler.preemptions,
            "blocks": self._pool.total,
            "blocks_used": self._pool.used,
            "blocks_idle": self._pool.idle,
            "kv_cache_tokens": self._pool.total * self._pool.block_tokens,
            "context_length": self._runner.context_length,
            "vocab_size": self._runner.vocab_size,
            "device": str(self._runner.device),
            "dtype": str(self._runner.dtype).removeprefix("torch."),
        }

    def find(self, request_id: str) -> list[dict[str, Any]]:
        """How far the requests of this id have come; `position` counts those that get a place before it."""
        places = [("running", 0, request) for request in self._scheduler.running]
        places += [("waiting", position, request) for position, request in enumerate(self._scheduler.waiting)]
        return [
            {"state": state, "position": position, "completion_tokens": request.generated}
            for state, position, request in places
            if request.id == request_id
        ]

    def known(self, request_ids: Collection[str]) -> list[str]:
        """Those of them that run or wait: the others have ended, or were lost with another process."""
        asked = set(request_ids)
        return [request.id for request in (*self._scheduler.running, *self._scheduler.waiting) if request.id in asked]

    def measures(self) -> dict[str, float]:
        """What is counted and what is the case now, for another thread: values of one moment, or nearly so."""
        return {
            **self._metrics.counted,
            "preemptions": self._scheduler.preemptions,
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "places": self._config.max_sequences,
            "kv_blocks": self._pool.total,
            "kv_blocks_used": self._pool.used,
            "kv_blocks_idle": self._pool.idle,
            "memory_bytes": self._runner.memory_bytes,
        }
