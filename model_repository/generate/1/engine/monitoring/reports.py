"""What an engine tells of itself: its state for callers, its measures for the metrics, where a request is.

It reads the other rooms and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from ..config import EngineConfig
from ..memory import full_context_slots
from ..request import Request
from ..runners.interface import Runner
from ..scheduling.admission import Door
from ..scheduling.scheduler import Scheduler
from .metrics import Metrics
from .progress import Progress

# What `status` tells of what was counted: whole numbers.
COUNTERS = (
    "requests", "finished", "cancelled", "timed_out", "failed", "refused", "steps", "prompt_tokens", "generated_tokens",
    "cached_tokens",
)  # fmt: skip

# A step that takes longer is called slow.
SLOW_STEP_SECONDS = 2.0


class Reports:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        scheduler: Scheduler,
        door: Door,
        metrics: Metrics,
        progress: Progress,
    ) -> None:
        self._runner, self._config, self._scheduler, self._pool = runner, config, scheduler, scheduler.pool
        self._door, self._metrics, self._progress = door, metrics, progress
        self._created, self._born = int(time.time()), time.monotonic()

    def status(self) -> dict[str, Any]:
        return {
            **{name: int(self._metrics.counted[name]) for name in COUNTERS},
            "tokens_per_second": round(self._metrics.generated.each_second(time.monotonic()), 1),
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "progress": self._progress.count,
            "still_seconds": round(self._progress.still_seconds(), 3),
            "step_running_seconds": round(self._progress.working_seconds(), 3),
            "slow": self._progress.working_seconds() > SLOW_STEP_SECONDS,
            "draining": self._door.is_draining,
            "retired": self._door.is_retired,
            "idle_seconds": round(self._door.idle_seconds, 3),
            "idle_unload_seconds": self._config.idle_unload_seconds,
            **self._memory(),
            "memory_claimed_bytes": self._runner.memory.claimed,
            "memory_budget": self._config.memory_budget,
            "created": self._created,
            "age_seconds": round(time.monotonic() - self._born, 3),
            "places": self._config.max_sequences,
            "preemptions": self._scheduler.preemptions,
            "blocks": self._pool.total,
            "blocks_used": self._pool.used,
            "blocks_idle": self._pool.idle,
            "kv_cache_tokens": self._pool.total * self._pool.block_tokens,
            "full_context_slots": full_context_slots(
                self._pool.total, self._pool.blocks_for(self._runner.context_length), self._config.max_sequences
            ),
            "context_length": self._runner.context_length,
            "vocab_size": self._runner.vocab_size,
            "device": str(self._runner.device),
            "dtype": str(self._runner.dtype).removeprefix("torch."),
        }

    def find(self, request_id: str, inside: Collection[Request]) -> list[dict[str, Any]]:
        """How far the requests of this id have come; `position` counts those that get a slot before it."""
        running = {request.number for request in tuple(self._scheduler.running)}
        waiting = sorted((request for request in inside if request.number not in running), key=lambda r: r.rank)
        positions = {request.number: position for position, request in enumerate(waiting)}
        return [
            {
                "state": "waiting" if request.number in positions else "running",
                "position": positions.get(request.number, 0),
                "completion_tokens": request.generated,
            }
            for request in inside
            if request.id == request_id
        ]

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
            **self._memory(),
        }

    def _memory(self) -> dict[str, int]:
        """What the engine takes now, and at most: no less than now, whatever its steps need beside the KV cache."""
        resident = self._runner.memory.resident
        return {"memory_bytes": resident, "memory_reserved_bytes": max(resident, self._runner.memory.reserved)}
