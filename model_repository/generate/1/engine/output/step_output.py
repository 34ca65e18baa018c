"""Processes a computed step: embeddings and log-probabilities of prompts, next tokens, and the end of sequences.

It knows rows of logits and requests. It does not know when steps run nor how chunks reach their callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

from tritonlm.contract import EngineFailure, InvalidRequest, TokenLogprob

from ..constraints.mask_worker import MaskWorker, StepMasks
from ..monitoring.metrics import ACCEPTED_TOKENS, DRAFT_TOKENS, FORCED_TOKENS, Metrics
from ..request import Item, Request
from ..runners.interface import ForwardOutput, Runner
from ..sampling.logprobs import Scores
from ..sampling.sampler import Argmax, HostTokens, Sampled, choose_tokens, sample
from ..sampling.token_masks import NO_MASK, TokenMasks
from ..scheduling.scheduler import Scheduler, Slice
from .sequence_output import STOP

# How long a step looks for forced tokens of one sequence, so that an endless text does not hold up the others.
_FORCED_SECONDS = 0.002


@dataclass(frozen=True)
class ChosenTokens:
    """The next tokens of these requests, on their way to the host."""

    requests: list[Request]
    tokens: HostTokens

    def read(self) -> dict[Request, list[Sampled | None]]:
        return {request: [token] for request, token in zip(self.requests, self.tokens.read(), strict=True)}


class StepOutputProcessor:
    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        metrics: Metrics,
        masks: MaskWorker,
        end: Callable[[Request, Item], None],
    ) -> None:
        """`end` removes a request and delivers its last item."""
        self._runner, self._scheduler, self._metrics, self._end = runner, scheduler, metrics, end
        self._mask_worker = masks

    def begin(self, plan: Sequence[Slice]) -> Future[StepMasks] | None:
        """Start the computation of the plan's token masks, before the step itself. None: it needs none."""
        constrained = [
            (piece.request.constraint, piece.draft_tokens)
            for piece in plan
            if piece.samples and piece.request.constraint
        ]
        return self._mask_worker.begin(constrained) if constrained else None

    def choose(
        self, plan: Sequence[Slice], rows: Sequence[int], computed: ForwardOutput, masks: Future[StepMasks] | None,
        offset: int = 0,
    ) -> ChosenTokens:  # fmt: skip
        """Choose the next tokens of these slices of the plan, each of which has one row of logits.

        With an `offset` of 1 the token before is chosen, and not yet appended; then no request has a constraint. The
        host does not wait for the tokens.
        """
        step_masks = masks.result() if masks else None
        requests = [plan[row].request for row in rows]
        tokens = choose_tokens(
            computed.logits, [request.sampling for request in requests], computed.argmax, self._runner.sample_tokens,
            self._runner.score, rows, _token_masks(requests, step_masks, 0) if step_masks else None, offset,
        )  # fmt: skip
        for row, request in enumerate(requests):
            request.sampling.count(tokens.ids[row : row + 1])
        return ChosenTokens(requests, tokens.start_copy())

    def process(
        self, plan: Sequence[Slice], computed: ForwardOutput, began: float, masks: Future[StepMasks] | None,
        chosen: Mapping[Request, Sequence[Sampled | None]] | None = None,
    ) -> None:  # fmt: skip
        """Pool or score prompts, sample next tokens, and end the sequences that are complete.

        `chosen` holds the next tokens, where they are chosen already; then no logits are read. Those after the first of
        a request are computed like accepted draft tokens.
        """
        # The first hidden row of each slice. Computed before any request changes: a scored prompt needs no more rows.
        ends = list(accumulate((len(piece.hidden_rows) for piece in plan), initial=0))
        not_finite = self._score_prompts(plan, computed, ends)
        row, sampling = 0, []
        for piece, (first, end) in zip(plan, pairwise(ends), strict=True):
            request = piece.request
            row += len(piece.logit_rows)
            if not request.has_first_token:
                self._metrics.count("prompt_tokens", piece.count)
                request.prefill_started_at = request.prefill_started_at or began
            self._scheduler.advance(piece)
            if request in not_finite:
                self._fail(request)
            elif request.embeds:
                request.output.add(piece.start, computed.hidden[first:end])
                if piece.samples:
                    self._finish_embedding(request)
            elif piece.samples:
                request.output.finish_prompt()
                sampling.append((piece, row - 1 - len(piece.draft_tokens)))
        self._sample(sampling, computed, masks, chosen)

    def _sample(
        self, sampling: list[tuple[Slice, int]], computed: ForwardOutput, masks: Future[StepMasks] | None,
        chosen: Mapping[Request, Sequence[Sampled | None]] | None,
    ) -> None:  # fmt: skip
        """`sampling` holds slices and their first logit rows.

        Pass n samples the n-th token of each slice. A slice stays for the next pass while its draft token is accepted,
        or while further tokens are chosen.
        """
        position, argmax = 0, computed.argmax
        step_masks = masks.result() if masks else None
        self._metrics.count(DRAFT_TOKENS, sum(len(piece.draft_tokens) for piece, _ in sampling))
        continuing: list[Request] = []
        while sampling:
            if step_masks:
                sampling = [entry for entry in sampling if self._may_go_on(entry[0].request, step_masks, position)]
            if chosen:
                sampled = [chosen[piece.request][position] for piece, _ in sampling]
            else:
                rows = [row + position for _, row in sampling]
                states = [piece.request.sampling for piece, _ in sampling]
                argmax = argmax or Argmax.of(computed.logits)
                requests = [piece.request for piece, _ in sampling]
                token_masks = _token_masks(requests, step_masks, position) if step_masks else None
                sampled = sample(
                    computed.logits, states, argmax, self._runner.sample_tokens, self._runner.score, rows, token_masks
                )
            accepted = []
            for (piece, row), token in zip(sampling, sampled, strict=True):
                drafts = piece.draft_tokens
                continues = self._take_token(piece.request, token)
                matches = token is not None and position < len(drafts) and token.token_id == drafts[position]
                if continues and (matches or (chosen and position + 1 < len(chosen[piece.request]))):
                    self._scheduler.accept(piece.request, 1)
                    self._metrics.count(ACCEPTED_TOKENS, int(matches))
                    accepted.append((piece, row))
                elif continues:
                    continuing.append(piece.request)
                    if drafts:
                        piece.request.prompt_lookup.record(len(drafts), position)
            sampling = accepted
            position += 1
        for request in continuing:
            self._append_forced(request)

    def _may_go_on(self, request: Request, masks: StepMasks, position: int) -> bool:
        """Whether the request's constraint allows a token here. If it does not, the request ends."""
        if request.constraint is None or request.output.finish_reason:
            return True
        row = masks.first_rows[request.constraint] + position
        if error := masks.errors.get(row):
            self._end(request, error)
        elif row in masks.ends:
            request.output.finish_reason = STOP
            self._finish(request)
        else:
            return True
        return False

    def _append_forced(self, request: Request) -> None:
        """Append the tokens that the request's grammar forces. The next step computes them together."""
        if request.constraint is None:
            return
        until = time.monotonic() + _FORCED_SECONDS
        while time.monotonic() < until:
            token_id = request.constraint.forced_token()
            if token_id is None:
                return
            self._metrics.count(FORCED_TOKENS)
            if not self._take_token(request, Sampled(token_id, _certain(token_id, request.parameters.logprobs))):
                return

    def _take_token(self, request: Request, token: Sampled | None) -> bool:
        """Append the next token to the request. Return whether the request continues."""
        if token is None:
            self._fail(request)
            return False
        if not request.output.finish_reason:
            request.ids.append(token.token_id)
            request.sampling.append(token.token_id)
            request.output.feed(token.token_id, token.logprob)
            if not self._advance(request, token.token_id):
                return False
            request.first_token_at = request.first_token_at or time.monotonic()
            self._metrics.count("generated_tokens")
        if request.output.finish_reason:
            self._finish(request)
            return False
        return True

    def _advance(self, request: Request, token_id: int) -> bool:
        """Pass the token to the request's constraint. Return whether that could take it."""
        if request.constraint is None or request.output.finish_reason == STOP:
            return True
        try:
            request.constraint.advance(token_id)
        except InvalidRequest as error:
            self._end(request, error)
            return False
        if request.constraint.complete:
            request.output.finish_reason = STOP
        return True

    def _finish(self, request: Request) -> None:
        self._metrics.count("finished")
        self._end(request, request.output.finish(request.output.finish_reason))

    def _finish_embedding(self, request: Request) -> None:
        if request.output.is_finite:
            self._metrics.count("finished")
            self._end(request, request.output.finish(STOP))
        else:
            self._fail(request)

    def _fail(self, request: Request) -> None:
        """End a request whose numbers are not finite.

        Its blocks hold them, and are published. Those that other requests share are theirs: if they are not finite
        either, those requests fail as well.
        """
        self._runner.clear(self._scheduler.pool.unpublish(request.table))
        self._end(request, EngineFailure("the model produced numbers that are not finite (NaN) for this prompt"))

    def _score_prompts(self, plan: Sequence[Slice], computed: ForwardOutput, ends: Sequence[int]) -> set[Request]:
        """Add log-probabilities to the plan's scored prompts. Return the requests with a row that is not finite."""
        rows: list[int] = []
        ids: list[int] = []
        spans: list[tuple[Request, int]] = []
        for piece, row in zip(plan, ends, strict=False):
            request = piece.request
            if request.scores_prompt and not request.embeds:
                first = max(piece.start, request.scored_tokens)
                last = min(piece.start + piece.count, len(request.prompt_ids) - 1)
                if first < last:
                    rows += range(row + first - piece.start, row + last - piece.start)
                    ids += request.prompt_ids[first + 1 : last + 1]
                    spans.append((request, last - first))
                    request.scored_tokens = last
        if not rows:
            return set()
        alternatives = [request.parameters.logprobs or 0 for request, count in spans for _ in range(count)]
        entries = iter(self._score(computed, rows, ids, alternatives))
        not_finite: set[Request] = set()
        for request, count in spans:
            usable = [entry for entry in islice(entries, count) if entry is not None]
            if len(usable) == count:
                request.output.add_prompt_logprobs(usable)
            else:
                not_finite.add(request)
        return not_finite

    def _score(
        self, computed: ForwardOutput, rows: Sequence[int], ids: Sequence[int], alternatives: Sequence[int]
    ) -> list[TokenLogprob | None]:
        """An entry for each of these hidden rows: all together, in bounded groups of rows."""
        parts: list[Scores] = []
        most, done = max(alternatives), 0
        for logits in self._runner.project(computed, rows):
            count = len(logits)
            parts.append(self._runner.score(logits, range(count), ids[done : done + count], most))
            done += count
            # Free the logits before the next group is computed.
            del logits
        return Scores.join(parts).entries(ids, alternatives)


def _token_masks(requests: Sequence[Request], masks: StepMasks, position: int) -> TokenMasks:
    """The masks for the tokens of these requests after so many draft tokens."""
    return TokenMasks(
        masks.words,
        [masks.first_rows[request.constraint] + position if request.constraint else NO_MASK for request in requests],
    )


def _certain(token_id: int, alternatives: int | None) -> TokenLogprob | None:
    """The log-probability of a token that is the only one allowed."""
    return None if alternatives is None else TokenLogprob(token_id, 0.0, ((token_id, 0.0),) if alternatives else ())
