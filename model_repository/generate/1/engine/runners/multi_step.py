"""Multi-step decoding: the runner decodes several tokens of each sequence in one call, without Python between them.

After each step Python takes as long as a layer or two of a small model, for its code lies in no cache then. A call of
several steps is made when every running request decodes one plain token: no prompt, no draft tokens, no grammar,
nothing that changes logits or returns them. It ends when chunks of text are due, so callers see the same pace; when a
sequence ends; or when another thread sets the interrupt, because a request came in or was cancelled. Each token is
chosen as by single steps. Those after the end of a sequence are discarded.

This module knows plans and chosen tokens, and not how they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ..interrupt import Interrupt
from ..output.step_output import StepOutputProcessor
from ..request import Request
from ..sampling.logit_filters import SamplingSettings, uniform
from ..sampling.sampler import Sampled
from ..scheduling.scheduler import Scheduler, Slice
from .interface import ForwardOutput, Runner

_NO_ROWS = torch.empty(0, 0)


@dataclass(frozen=True)
class TokenChoice:
    """How the tokens of each sequence are chosen, and which of them end it."""

    settings: Sequence[SamplingSettings]
    # [steps][sequences]
    uniforms: npt.NDArray[np.float64]
    end_ids: Sequence[Collection[int]]

    @classmethod
    def of(cls, requests: Sequence[Request], steps: int) -> TokenChoice:
        states = [request.sampling for request in requests]
        uniforms = np.zeros((steps, len(states)))
        for row, state in enumerate(states):
            if not state.is_greedy:
                positions = range(state.position, state.position + steps)
                uniforms[:, row] = uniform([state.seed] * steps, [state.parameters.choice] * steps, positions)
        return cls([state.settings for state in states], uniforms, [request.output.end_ids for request in requests])

    @property
    def steps(self) -> int:
        return len(self.uniforms)

    @property
    def is_greedy(self) -> bool:
        return not any(row.temperature for row in self.settings)


@dataclass(frozen=True)
class DecodedTokens:
    """The tokens of each step, [steps][sequences]. One of a row without a finite logit is unusable."""

    ids: list[list[int]]
    max_logits: list[list[float]]

    def of(self, requests: Sequence[Request]) -> dict[Request, list[Sampled | None]]:
        columns = zip(requests, zip(*self.ids, strict=True), zip(*self.max_logits, strict=True), strict=True)
        return {
            request: [
                Sampled(token_id, None) if math.isfinite(logit) else None
                for token_id, logit in zip(ids, logits, strict=True)
            ]
            for request, ids, logits in columns
        }


@runtime_checkable
class MultiStepRunner(Runner, Protocol):
    def decode(self, plan: Sequence[Slice], choice: TokenChoice, interrupt: Interrupt, seconds: float) -> DecodedTokens:
        """At most `choice.steps` steps of slices of one token, of which the last begins within these seconds."""
        ...


class MultiStep:
    def __init__(
        self, runner: MultiStepRunner, scheduler: Scheduler, step_output: StepOutputProcessor, interrupt: Interrupt,
        most: int,
    ) -> None:  # fmt: skip
        """`most`: steps of a call."""
        self._runner, self._scheduler, self._step_output = runner, scheduler, step_output
        self._interrupt, self._most = interrupt, most

    def run(self, plan: Sequence[Slice], began: float, seconds: float) -> int:
        """Compute the plan and further steps that begin within these seconds. Return how many; 0: it needs a single
        step."""
        steps = self._steps(plan, seconds)
        if steps < 2:
            return 0
        requests = [piece.request for piece in plan]
        tokens = self._runner.decode(plan, TokenChoice.of(requests, steps), self._interrupt, seconds)
        self._step_output.process(plan, ForwardOutput(_NO_ROWS, _NO_ROWS), began, None, tokens.of(requests))
        return len(tokens.ids)

    def _steps(self, plan: Sequence[Slice], seconds: float) -> int:
        step_seconds = self._scheduler.budget.decode_seconds
        if seconds <= 0 or not step_seconds or self._scheduler.waiting or not all(map(_is_plain, plan)):
            return 1
        left = min(_tokens_left(piece.request) for piece in plan)
        steps = min(math.ceil(seconds / step_seconds), left, self._most)
        return steps if steps > 1 and self._scheduler.reserve(plan, steps) else 1


def _is_plain(piece: Slice) -> bool:
    request = piece.request
    return (
        piece.count == 1
        and piece.samples
        and not (request.needs_every_row or request.embeds or request.constraint or request.isolated_steps)
        and request.prompt_lookup is None
        and request.has_first_token
        and request.sampling.is_plain
    )


def _tokens_left(request: Request) -> int:
    assert request.parameters.max_tokens is not None
    return request.parameters.max_tokens - request.generated
