"""Reports of an engine: its status, its metric values, and the state of a request.

It reads the other parts of the engine and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from ..adapters.store import AdapterStore
from ..config import EngineConfig
from ..memory import full_context_slots
from ..request import Request
from ..runners.interface import Runner
from ..scheduling.admission import AdmissionQueue
from ..scheduling.scheduler import Scheduler
from .metrics import Metrics, with_aliases
from .progress import Progress

# The counters in the status report, as integers.
COUNTERS = (
    "requests", "finished", "cancelled", "timed_out", "failed", "refused", "steps", "prompt_tokens", "generated_tokens",
    "cached_tokens",
)  # fmt: skip

# A step that takes longer is reported as slow.
SLOW_STEP_SECONDS = 2.0


class Reports:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        scheduler: Scheduler,
        admission: AdmissionQueue,
        metrics: Metrics,
        progress: Progress,
        adapters: AdapterStore | None = None,
    ) -> None:
        self._runner, self._config, self._scheduler, self._pool = runner, config, scheduler, scheduler.pool
        self._admission, self._metrics, self._progress = admission, metrics, progress
        self._adapters = adapters
        self._created, self._started_at = int(time.time()), time.monotonic()

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
            "draining": self._admission.is_draining,
            "retired": self._admission.is_retired,
            "idle_seconds": round(self._admission.idle_seconds, 3),
            "idle_unload_seconds": self._config.idle_unload_seconds,
            **self._memory(),
            "memory_claimed_bytes": self._runner.memory.claimed,
            "memory_budget": self._config.memory_budget,
            "created": self._created,
            "age_seconds": round(time.monotonic() - self._started_at, 3),
            "slots": self._config.max_sequences,
            # Former name of `slots`.
            "places": self._config.max_sequences,
            "preemptions": self._scheduler.preemptions,
            "blocks": self._pool.total,
            "blocks_used": self._pool.used,
            "blocks_idle": self._pool.idle,
            "kv_cache_tokens": self._pool.total * self._pool.block_tokens,
            "full_context_slots": full_context_slots(
                self._pool.total, self._pool.blocks_for(self._runner.context_length), self._config.max_sequences
            ),
            "adapters": self._adapters.report() if self._adapters else [],
            "context_length": self._runner.context_length,
            "vocab_size": self._runner.vocab_size,
            "device": str(self._runner.device),
            "dtype": str(self._runner.dtype).removeprefix("torch."),
        }

    def find(self, request_id: str, requests: Collection[Request]) -> list[dict[str, Any]]:
        """The state of the requests with this id. `position` is the number of requests that get a slot before it."""
        running = {request.number for request in tuple(self._scheduler.running)}
        waiting = sorted((request for request in requests if request.number not in running), key=lambda r: r.rank)
        positions = {request.number: position for position, request in enumerate(waiting)}
        return [
            {
                "state": "waiting" if request.number in positions else "running",
                "position": positions.get(request.number, 0),
                "completion_tokens": request.generated,
            }
            for request in requests
            if request.id == request_id
        ]

    def metric_values(self) -> dict[str, float]:
        """The current values of all counters and gauges. Another thread may call this."""
        values = {
            **self._metrics.counted,
            "preemptions": self._scheduler.preemptions,
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "slots": self._config.max_sequences,
            "kv_blocks": self._pool.total,
            "kv_blocks_used": self._pool.used,
            "kv_blocks_idle": self._pool.idle,
            "adapters": self._adapters.count if self._adapters else 0,
            "adapter_bytes": self._adapters.nbytes if self._adapters else 0,
            "adapter_loads": self._adapters.loads if self._adapters else 0,
            **self._memory(),
        }
        return with_aliases(values)

    def _memory(self) -> dict[str, int]:
        """The memory in use now, and the most that may be in use: never less than now."""
        resident = self._runner.memory.resident
        most = self._runner.memory.most(self._adapters.limit if self._adapters else 0)
        return {"memory_bytes": resident, "memory_reserved_bytes": max(resident, most)}
