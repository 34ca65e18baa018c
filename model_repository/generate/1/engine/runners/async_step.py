"""One step ahead: while the device computes a step, the next one is launched, on tokens that nobody here has seen yet.

So a GPU does not wait for Python. Only plain decoding goes ahead: what a token changes beside its sequence's context
(penalties, log-probabilities, who is admitted) waits until it is known. A sequence that turns out to have ended has
been computed one token too far, which nobody ever sees. It knows plans and tokens on the device, not what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..output.step_output import Outcome
from ..sampling.sampler import Chosen, choose
from ..scheduling.scheduler import Scheduler, Slice
from .interface import Computed, Runner


@runtime_checkable
class AheadRunner(Runner, Protocol):
    def goes_ahead(self, plan: Sequence[Slice]) -> bool:
        """Whether it can compute this decoding step on tokens that are known on the device alone."""
        ...

    def forward_after(self, plan: Sequence[Slice], ids: torch.Tensor) -> Computed: ...


@dataclass(frozen=True)
class Flight:
    """A step that has been launched."""

    plan: list[Slice]
    computed: Computed
    began: float
    # Its next tokens, where they are chosen without looking at anything here.
    chosen: Chosen | None


class Ahead:
    def __init__(self, runner: AheadRunner, scheduler: Scheduler, outcome: Outcome) -> None:
        self._runner, self._scheduler, self._outcome = runner, scheduler, outcome
        self._flight: Flight | None = None

    def step(self, began: float) -> list[Slice]:
        """Bring one step to its end, with the next one under way; its plan, empty where there was nothing to do."""
        flight, self._flight = self._flight or self._launch(began), None
        if flight is None:
            return []
        self._flight = self._launch_after(flight, began)
        self._settle(flight)
        return flight.plan

    def forget(self) -> None:
        """What is under way has failed."""
        self._flight = None

    def _launch(self, began: float) -> Flight | None:
        plan = self._scheduler.plan()
        if not plan:
            return None
        computed = self._runner.forward(plan)
        return Flight(plan, computed, began, self._choose(plan, computed, 0) if _is_plain(plan, 0) else None)

    def _launch_after(self, flight: Flight, began: float) -> Flight | None:
        if flight.chosen is None:
            return None
        rows, plan = self._scheduler.plan_after(flight.plan)
        if not plan or not _is_plain(plan, 1) or not self._runner.goes_ahead(plan):
            return None
        ids = flight.chosen.ids
        computed = self._runner.forward_after(plan, ids if len(rows) == len(ids) else ids[rows])
        return Flight(plan, computed, began, self._choose(plan, computed, 1))

    def _choose(self, plan: Sequence[Slice], computed: Computed, ahead: int) -> Chosen:
        states = [piece.request.sampling for piece in plan]
        return choose(
            computed.logits, states, computed.best, self._runner.draw, self._runner.score, ahead=ahead
        ).on_its_way()

    def _settle(self, flight: Flight) -> None:
        if flight.chosen is None:
            self._outcome.give(flight.plan, flight.computed, flight.began)
            return
        tokens = flight.chosen.read()
        # Some may have ended, or been taken out, since it was launched.
        rows = self._scheduler.still_running(flight.plan)
        plan = [flight.plan[row] for row in rows]
        self._outcome.give(plan, flight.computed, flight.began, [tokens[row] for row in rows])


def _is_plain(plan: Sequence[Slice], ahead: int) -> bool:
    """Whether all of them get their next token by their logits and their settings alone."""
    return all(
        not piece.request.needs_every_row
        and piece.request.lookup is None
        and (ahead or (piece.samples and piece.request.parameters.max_tokens))
        and piece.request.sampling.is_plain(ahead)
        for piece in plan
    )
