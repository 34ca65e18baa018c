"""What comes of a computed step: embeddings and scores of prompts, next tokens, and the end of what has ended.

It knows rows of logits and requests, not when steps are made nor how answers reach their callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, islice, pairwise

from tritonlm.contract import EngineFailure, TokenLogprob

from ..monitoring.metrics import Metrics
from ..request import Item, Request
from ..runners.interface import Computed, Runner
from ..sampling.logprobs import Scores
from ..sampling.sampler import Best, Sampled, sample
from ..scheduling.scheduler import Scheduler, Slice
from .sequence_output import STOP


class Outcome:
    def __init__(
        self, runner: Runner, scheduler: Scheduler, metrics: Metrics, end: Callable[[Request, Item], None]
    ) -> None:
        """`end` takes a request out and gives it its last item."""
        self._runner, self._scheduler, self._metrics, self._end = runner, scheduler, metrics, end

    def give(
        self, plan: Sequence[Slice], computed: Computed, began: float, drawn: list[Sampled | None] | None = None
    ) -> None:
        """Give every slice its rows: pool or score prompts, sample next tokens, end what has ended.

        `drawn`: the slices' tokens, where they have been drawn; then no row is looked at.
        """
        # Where each slice's hidden states lie. Before anything changes: a prompt that has been scored wants none.
        ends = list(accumulate((len(piece.hidden_rows) for piece in plan), initial=0))
        self._score_prompts(plan, computed, ends)
        row, sampling = 0, []
        for piece, (first, end) in zip(plan, pairwise(ends), strict=True):
            request = piece.request
            row += len(piece.logit_rows)
            if not request.started_answering:
                self._metrics.count("prompt_tokens", piece.count)
                request.began = request.began or began
            self._scheduler.advance(piece)
            if request.embeds:
                request.answer.add(piece.start, computed.hidden[first:end])
                if piece.samples:
                    self._metrics.count("finished")
                    self._end(request, request.answer.final(STOP))
                continue
            if piece.samples:
                request.answer.end_of_prompt()
                sampling.append((piece, row - 1 - len(piece.guesses)))
        self._sample(sampling, computed, drawn)

    def _sample(
        self, sampling: list[tuple[Slice, int]], computed: Computed, drawn: list[Sampled | None] | None
    ) -> None:
        """Slices and their first rows. A guess is looked at when the token before it has turned out as guessed."""
        turn, best = 0, computed.best
        self._metrics.count("guessed_tokens", sum(len(piece.guesses) for piece, _ in sampling))
        while sampling:
            if turn or drawn is None:
                rows = [row + turn for _, row in sampling]
                states = [piece.request.sampling for piece, _ in sampling]
                best = best or Best.of(computed.logits)
                drawn = sample(computed.logits, states, best, self._runner.draw, self._runner.score, rows)
            right = []
            for (piece, row), token in zip(sampling, drawn, strict=True):
                going_on = self._take_token(piece.request, token)
                guessed = token is not None and turn < len(piece.guesses) and token.token_id == piece.guesses[turn]
                if going_on and guessed:
                    self._scheduler.accept(piece.request, 1)
                    self._metrics.count("rightly_guessed_tokens")
                    right.append((piece, row))
                elif going_on and piece.guesses:
                    piece.request.lookup.judge(len(piece.guesses), turn)
            sampling = right
            turn += 1

    def _take_token(self, request: Request, token: Sampled | None) -> bool:
        """Give the request its next token; whether it goes on."""
        if token is None:
            self._runner.clear(request.table.blocks)
            self._end(request, EngineFailure("the model produced numbers that are not finite (NaN) for this prompt"))
            return False
        if not request.answer.finish_reason:
            request.ids.append(token.token_id)
            request.sampling.append(token.token_id)
            request.answer.feed(token.token_id, token.logprob)
            request.answered = request.answered or time.monotonic()
            self._metrics.count("generated_tokens")
        if request.answer.finish_reason:
            self._metrics.count("finished")
            self._end(request, request.answer.final(request.answer.finish_reason))
            return False
        return True

    def _score_prompts(self, plan: Sequence[Slice], computed: Computed, ends: Sequence[int]) -> None:
        """Give prompts their log-probabilities: those of all of them together, in slices of rows, never all at once."""
        rows: list[int] = []
        ids: list[int] = []
        pieces: list[tuple[Request, int]] = []
        for piece, row in zip(plan, ends, strict=False):
            request = piece.request
            if request.scores_prompt and not request.embeds:
                if piece.start == 0 and not request.scored and not request.generated:
                    request.answer.score_prompt([TokenLogprob(request.prompt_ids[0], None)])
                first = max(piece.start, request.scored)
                last = min(piece.start + piece.count, len(request.prompt_ids) - 1)
                if first < last:
                    rows += range(row + first - piece.start, row + last - piece.start)
                    ids += request.prompt_ids[first + 1 : last + 1]
                    pieces.append((request, last - first))
                    request.scored = last
        if not rows:
            return
        parts: list[Scores] = []
        most = max(request.parameters.logprobs or 0 for request, _ in pieces)
        done = 0
        for logits in self._runner.project(computed, rows):
            count = len(logits)
            parts.append(self._runner.score(logits, range(count), ids[done : done + count], most))
            done += count
            # Before the next slice is computed.
            del logits
        wanted = [request.parameters.logprobs or 0 for request, count in pieces for _ in range(count)]
        entries = iter(Scores.join(parts).entries(ids, wanted))
        for request, count in pieces:
            request.answer.score_prompt([entry for entry in islice(entries, count) if entry is not None])
