"""Asynchronous scheduling: while the device computes a step, the next step is launched on tokens still on the device.

So a GPU does not wait for Python. Only plain decoding is launched asynchronously. A step whose tokens change more than
their sequence's context (penalties, constraints, log-probabilities, admission) waits for the previous step. A sequence
that ends has one more token computed, which is discarded. This module knows plans and device tokens, and not what they
cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..output.step_output import StepOutputProcessor
from ..sampling.sampler import PendingTokens, choose_tokens
from ..scheduling.scheduler import Scheduler, Slice
from .interface import ForwardOutput, Runner


@runtime_checkable
class AsyncRunner(Runner, Protocol):
    def can_run_async(self, plan: Sequence[Slice]) -> bool:
        """Whether it can compute this decoding step on tokens that exist on the device alone."""
        ...

    def forward_async(self, plan: Sequence[Slice], ids: torch.Tensor) -> ForwardOutput: ...


@dataclass(frozen=True)
class LaunchedStep:
    plan: list[Slice]
    computed: ForwardOutput
    began: float
    # Its next tokens, where they need no decision on the host.
    tokens: PendingTokens | None


class AsyncStep:
    def __init__(self, runner: AsyncRunner, scheduler: Scheduler, step_output: StepOutputProcessor) -> None:
        self._runner, self._scheduler, self._step_output = runner, scheduler, step_output
        self._launched: LaunchedStep | None = None

    def step(self, began: float) -> list[Slice]:
        """Launch the next step, then complete the current one. Return the current plan, empty if there is none."""
        current, self._launched = self._launched or self._launch(began), None
        if current is None:
            return []
        self._launched = self._launch_next(current, began)
        self._complete(current)
        return current.plan

    def discard(self) -> None:
        """Drop the launched step after a failure."""
        self._launched = None

    def _launch(self, began: float) -> LaunchedStep | None:
        plan = self._scheduler.plan()
        if not plan:
            return None
        is_plain = _is_plain(plan, 0)
        if not is_plain:
            self._step_output.begin(plan)
        computed = self._runner.forward(plan)
        return LaunchedStep(plan, computed, began, self._sample(plan, computed, 0) if is_plain else None)

    def _launch_next(self, current: LaunchedStep, began: float) -> LaunchedStep | None:
        if current.tokens is None:
            return None
        rows, plan = self._scheduler.plan_async(current.plan)
        if not plan or not _is_plain(plan, 1) or not self._runner.can_run_async(plan):
            return None
        ids = current.tokens.ids
        computed = self._runner.forward_async(plan, ids if len(rows) == len(ids) else ids[rows])
        return LaunchedStep(plan, computed, began, self._sample(plan, computed, 1))

    def _sample(self, plan: Sequence[Slice], computed: ForwardOutput, offset: int) -> PendingTokens:
        states = [piece.request.sampling for piece in plan]
        return choose_tokens(
            computed.logits, states, computed.argmax, self._runner.sample_tokens, self._runner.score, offset=offset
        ).start_copy()

    def _complete(self, step: LaunchedStep) -> None:
        if step.tokens is None:
            self._step_output.process(step.plan, step.computed, step.began)
            return
        tokens = step.tokens.read()
        # Some requests may have ended or been removed since the launch.
        rows = self._scheduler.still_running(step.plan)
        plan = [step.plan[row] for row in rows]
        self._step_output.process(plan, step.computed, step.began, [tokens[row] for row in rows])


def _is_plain(plan: Sequence[Slice], offset: int) -> bool:
    """Whether the next token of each request depends on its logits and sampling settings alone."""
    return all(
        not piece.request.needs_every_row
        and piece.request.prompt_lookup is None
        and (offset or (piece.samples and piece.request.parameters.max_tokens))
        and piece.request.sampling.is_plain(offset)
        for piece in plan
    )
