"""What a client tells of the sequences of its calls, to whoever wants to count it.

It knows moments and numbers, not where they go.
"""

from __future__ import annotations

import time

from tritonlm.client.transport import Call
from tritonlm.client.types import Piece
from tritonlm.contract import TritonLMError


class Observer:
    """One that does not listen."""

    def first_piece(self, model: str, seconds: float) -> None:
        """A stream's first text is there, so long after it was asked for."""

    def next_piece(self, model: str, seconds: float, tokens: int) -> None:
        """More of it came, so long after the last, with so many tokens."""

    def ended(self, model: str, reason: str) -> None:
        """A sequence's last piece has come."""

    def tries_again(self, error: str, resumes: bool) -> None:
        """A try ended with an error of this name; the next one goes on where it was, or begins."""


class Told:
    """What is told of one sequence."""

    def __init__(self, observer: Observer, call: Call) -> None:
        self._observer, self._model, self._is_stream = observer, call.model, call.stream
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
        self._observer.tries_again(type(error).__name__, self._has_begun)
