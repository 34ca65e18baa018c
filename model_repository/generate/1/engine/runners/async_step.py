"""Asynchronous scheduling: while the device computes a step, the next step is launched on tokens still on the device.

So a GPU does not wait for Python. A step is launched when every running request decodes one token of its own: nothing
is admitted, no prompt is computed or scored, there are no draft tokens and no tokens that a grammar has forced. Its
tokens are chosen at once, with penalties, bans and log-probabilities: the device counts the token before. Only a
grammar's mask needs that token on the host. In a batch with a grammar the step is launched likewise, and its tokens are
chosen when those before have been read: the masks are computed and uploaded while the device computes the step.

A sequence that ends has one more token computed, which is discarded. This module knows plans and device tokens, and not
what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..constraints.mask_worker import StepMasks
from ..output.step_output import ChosenTokens, StepOutputProcessor
from ..sampling.transfer import row_index
from ..scheduling.scheduler import Scheduler, Slice
from .interface import ForwardOutput, Runner


@runtime_checkable
class AsyncRunner(Runner, Protocol):
    def can_run_async(self, plan: Sequence[Slice]) -> bool:
        """Whether it can compute this decoding step on tokens that exist on the device alone."""
        ...

    def forward_async(self, plan: Sequence[Slice], ids: torch.Tensor) -> ForwardOutput: ...


@dataclass
class LaunchedStep:
    plan: list[Slice]
    computed: ForwardOutput
    began: float
    # None: no request needs one, or they depend on tokens that are not read yet.
    masks: Future[StepMasks] | None = None
    # Its next tokens. None before the tokens that its masks depend on are read, or where the step output samples them.
    chosen: ChosenTokens | None = None


class AsyncStep:
    def __init__(self, runner: AsyncRunner, scheduler: Scheduler, step_output: StepOutputProcessor) -> None:
        self._runner, self._scheduler, self._step_output = runner, scheduler, step_output
        self._launched: LaunchedStep | None = None

    def step(self, began: float) -> list[Slice]:
        """Launch the next step, then complete the current one. Return the current plan, empty if there is none."""
        current, self._launched = self._launched or self._launch(began), None
        if current is None:
            return []
        following = self._launch_next(current, began)
        self._complete(current)
        if following and following.chosen is None:
            self._choose_with_masks(following)
        self._launched = following
        return current.plan

    def discard(self) -> None:
        """Drop the launched step after a failure."""
        self._launched = None

    def _launch(self, began: float) -> LaunchedStep | None:
        plan = self._scheduler.plan()
        if not plan:
            return None
        masks = self._step_output.begin(plan)
        step = LaunchedStep(plan, self._runner.forward(plan), began, masks)
        if all(_is_single(piece) and piece.samples and piece.request.parameters.max_tokens for piece in plan):
            step.chosen = self._step_output.choose(plan, range(len(plan)), step.computed, masks)
        return step

    def _launch_next(self, current: LaunchedStep, began: float) -> LaunchedStep | None:
        running = self._scheduler.still_running(current.plan)
        row_of = {request: row for row, request in enumerate(current.chosen.requests)} if current.chosen else {}
        if current.chosen is None or any(current.plan[row].request not in row_of for row in running):
            return None
        plan = self._scheduler.plan_async(current.plan)
        if not plan or not all(map(_is_single, plan)) or not self._runner.can_run_async(plan):
            return None
        ids, rows = current.chosen.tokens.ids, [row_of[piece.request] for piece in plan]
        ids = ids if len(rows) == len(ids) else ids[row_index(rows, ids.device)]
        following = LaunchedStep(plan, self._runner.forward_async(plan, ids), began)
        if not any(piece.request.constraint for piece in plan):
            following.chosen = self._step_output.choose(plan, range(len(plan)), following.computed, None, offset=1)
        return following

    def _choose_with_masks(self, step: LaunchedStep) -> None:
        """Choose the tokens of a launched step, now that those before are appended."""
        rows = [row for row in self._scheduler.still_running(step.plan) if step.plan[row].samples]
        step.masks = self._step_output.begin([step.plan[row] for row in rows])
        step.chosen = self._step_output.choose(step.plan, rows, step.computed, step.masks)

    def _complete(self, step: LaunchedStep) -> None:
        # Some requests may have ended or been removed since the launch.
        plan = [step.plan[row] for row in self._scheduler.still_running(step.plan)] if step.chosen else step.plan
        self._step_output.process(
            plan, step.computed, step.began, step.masks, step.chosen.read() if step.chosen else None
        )


def _is_single(piece: Slice) -> bool:
    """Whether the slice has one row of logits and nothing else, whatever the tokens before."""
    return not piece.request.needs_every_row and piece.request.prompt_lookup is None
