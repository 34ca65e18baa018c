"""What comes of a computed step: embeddings and scores of prompts, next tokens, and the end of what has ended.

It knows rows of logits and requests, not when steps are made nor how answers reach their callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from tritonlm.contract import EngineFailure, TokenLogprob

from .answer import STOP
from .metrics import Metrics
from .model_runner import Computed, Runner
from .request import Item, Request
from .sampler import Sampled, sample, score_prompt
from .scheduler import Scheduler, Slice


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
        row, sampling = 0, []
        for piece in plan:
            request, first = piece.request, row
            row += len(piece.wanted)
            if not request.started_answering:
                self._metrics.count("prompt_tokens", piece.count)
                request.began = request.began or began
            self._scheduler.advance(piece)
            if request.wanted.embed:
                request.answer.add(piece.start, computed.hidden[first:row])
                if piece.samples:
                    self._metrics.count("finished")
                    self._end(request, request.answer.final(STOP))
                continue
            if request.scores_prompt:
                self._score_prompt(piece, computed.logits[first:row])
            if piece.samples:
                request.answer.end_of_prompt()
                sampling.append((piece, row - 1 - len(piece.guesses)))
        self._sample(sampling, computed, drawn)

    def _sample(
        self, sampling: list[tuple[Slice, int]], computed: Computed, drawn: list[Sampled | None] | None
    ) -> None:
        """Slices and their first rows. A guess is looked at when the token before it has turned out as guessed."""
        turn = 0
        self._metrics.count("guessed_tokens", sum(len(piece.guesses) for piece, _ in sampling))
        while sampling:
            if turn or drawn is None:
                chosen = computed.only([row + turn for _, row in sampling])
                states = [piece.request.sampling for piece, _ in sampling]
                drawn = sample(chosen.logits, states, chosen.best, self._runner.draw)
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

    def _score_prompt(self, piece: Slice, logits: torch.Tensor) -> None:
        request = piece.request
        if piece.start == 0 and not request.scored:
            request.answer.score_prompt([TokenLogprob(request.prompt_ids[0], None)])
        first = max(piece.start, request.scored)
        last = min(piece.start + piece.count, len(request.prompt_ids) - 1)
        if first < last:
            rows = logits[first - piece.start : last - piece.start]
            entries = score_prompt(rows, request.prompt_ids[first + 1 : last + 1], request.parameters.logprobs or 0)
            request.answer.score_prompt([entry for entry in entries if entry is not None])
            request.scored = last
