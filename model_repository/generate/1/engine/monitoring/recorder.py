"""Records what a step and an ended request took: in the metrics, the step budget and the speculation gate.

It decides nothing about the next step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..request import Request
from ..scheduling.scheduler import Scheduler, Slice
from ..scheduling.speculation import SpeculationGate
from .metrics import DECODE_SECONDS, PREFILL_SECONDS, QUEUE_SECONDS, STEP_SECONDS, STEP_SEQUENCES, Metrics
from .reports import SLOW_STEP_SECONDS

_log = logging.getLogger("tritonlm.engine")


@dataclass(frozen=True)
class StepBegin:
    """The state before a step."""

    at: float
    decoding: bool
    batch_size: int
    generated: float


class Recorder:
    def __init__(self, metrics: Metrics, scheduler: Scheduler, gate: SpeculationGate | None) -> None:
        self._metrics, self._scheduler, self._gate = metrics, scheduler, gate

    def begin_step(self) -> StepBegin:
        generated = self._metrics.counted["generated_tokens"]
        return StepBegin(time.monotonic(), self._scheduler.decoding, len(self._scheduler.running), generated)

    def end_step(self, plan: Sequence[Slice], begin: StepBegin, steps: int = 1) -> None:
        """`steps`: how many the plan's requests were computed for, at once."""
        now = time.monotonic()
        seconds, generated = now - begin.at, self._metrics.counted["generated_tokens"] - begin.generated
        self._metrics.count("steps", steps)
        self._metrics.count(STEP_SEQUENCES, len(plan) * steps)
        self._metrics.count(STEP_SECONDS, seconds)
        if seconds > SLOW_STEP_SECONDS:
            # Warn once; the metric counts the others.
            level = logging.DEBUG if self._metrics.counted["slow_steps"] else logging.WARNING
            _log.log(level, "a step of %d requests took %.1f s: slow, not hung", len(plan), seconds)
            self._metrics.count("slow_steps")
        self._metrics.generated.add(generated, now)
        prompt_tokens = sum(piece.known for piece in plan if piece.known > 1)
        self._scheduler.budget.record(begin.decoding, prompt_tokens, seconds / steps)
        # Only pure decoding steps are compared: prefill takes time of its own.
        if self._gate and len(plan) == begin.batch_size and not prompt_tokens:
            self._gate.record(begin.batch_size, self._scheduler.speculating, generated, seconds)

    def end_request(self, request: Request) -> None:
        now = request.ended_at = time.monotonic()
        self._metrics.count("cached_tokens", request.cached_tokens)
        self._metrics.time(QUEUE_SECONDS, (request.prefill_started_at or now) - request.arrived_at)
        if request.prefill_started_at is not None:
            self._metrics.time(PREFILL_SECONDS, (request.first_token_at or now) - request.prefill_started_at)
        if request.first_token_at is not None:
            self._metrics.time(DECODE_SECONDS, now - request.first_token_at)
