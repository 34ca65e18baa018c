"""Events of a client's sequences, for a caller that counts them. It knows times and numbers, not where they go."""

from __future__ import annotations

import time

from tritonlm.client.transport import Call
from tritonlm.client.types import Piece
from tritonlm.contract import TritonLMError


class Observer:
    """The interface; this base class ignores all events."""

    def first_piece(self, model: str, seconds: float) -> None:
        """A stream's first text has arrived, `seconds` after the call."""

    def next_piece(self, model: str, seconds: float, tokens: int) -> None:
        """A stream's next text has arrived, with `tokens` tokens, `seconds` after the last one."""

    def ended(self, model: str, reason: str) -> None:
        """A sequence's last piece has arrived."""

    def retried(self, error: str, resumes: bool) -> None:
        """An attempt ended with this error class; the next one resumes the sequence or starts it."""
        self.tries_again(error, resumes)

    def tries_again(self, error: str, resumes: bool) -> None:
        """Deprecated: the old name of `retried`."""


class SequenceReporter:
    """Reports one sequence's events to an observer."""

    def __init__(self, observer: Observer, call: Call) -> None:
        self._observer, self._model, self._is_stream = (
            observer,
            call.parameters.get("adapter") or call.model,
            call.stream,
        )
        self._last, self._tokens, self._has_begun = time.monotonic(), 0, False

    def piece(self, piece: Piece) -> None:
        now = time.monotonic()
        tokens = piece.completion_tokens - self._tokens
        if self._is_stream and not self._has_begun:
            self._observer.first_piece(self._model, now - self._last)
        elif self._is_stream and tokens > 0:
            self._observer.next_piece(self._model, now - self._last, tokens)
        if piece.finish_reason:
            self._observer.ended(self._model, piece.finish_reason)
        self._last, self._tokens, self._has_begun = now, piece.completion_tokens, True

    def error(self, error: TritonLMError) -> None:
        self._observer.retried(type(error).__name__, self._has_begun)
