"""One sequence's way through several tries: what has come of it, and how it is asked for again after a fault.

A fault costs its caller a pause: the next try is told the tokens that have come, and goes on with the next one. It
knows neither connections nor which Triton is asked.
"""

from __future__ import annotations

import time
from dataclasses import replace

from tritonlm.client.transport import Call
from tritonlm.client.types import Piece
from tritonlm.contract import (
    Broken,
    Draining,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    TimedOut,
    TritonLMError,
    Unavailable,
)

# Nothing has been computed when these come: asking again, or somewhere else, is safe.
_RETRIED = (Unavailable, Draining, QueueFull)
# What a process that is just being brought back may say, beside that.
_WHILE_BROKEN = (*_RETRIED, QueueTimeout, ModelNotFound)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 2.0
_LONGEST_PAUSE_WHILE_BROKEN = 0.4


class Tries:
    def __init__(self, call: Call, max_retries: int, repair_seconds: float) -> None:
        """`repair_seconds`: how long what has broken is waited for, each time anew."""
        self._call = call
        self._deadline = time.monotonic() + call.timeout
        self._left, self._repair_seconds = max_retries, repair_seconds
        self._tries = self._pauses = 0
        self._broken_since: float | None = None
        # What has come: the last piece as it was given on, and all tokens.
        self._last: Piece | None = None
        self._ids: list[int] = []
        self._expected = 0

    def next_call(self) -> Call:
        """What to ask for now, under an id of its own: the engine may still be at the last try."""
        call = self._call
        parameters = dict(call.parameters)
        if call.stream:
            parameters["return_token_ids"] = True
        if self._ids:
            parameters["resume_token_ids"] = list(self._ids)
        request_id = f"{call.request_id}-{self._tries}" if self._tries else call.request_id
        timeout = self._deadline - time.monotonic()
        if timeout <= 0:
            raise TimedOut("the request was not finished in the time that it was given")
        self._tries += 1
        self._expected = 0
        return replace(call, request_id=request_id, parameters=parameters, timeout=timeout)

    def take(self, piece: Piece) -> Piece:
        """A try's piece as one of the whole sequence."""
        if piece.index != self._expected:
            raise Broken(f"chunk {piece.index} came where chunk {self._expected} was due")
        self._expected += 1
        self._broken_since, self._pauses = None, 0
        if self._call.stream:
            self._ids += piece.token_ids
        shown = piece.token_ids if self._call.parameters.get("return_token_ids") else []
        before = self._last
        index = 0 if before is None else before.index + 1
        # What a later try finds in its cache is our own prompt.
        cached = piece.cached_tokens if before is None else before.cached_tokens
        self._last = replace(piece, index=index, cached_tokens=cached, token_ids=shown)
        return self._last

    def after(self, error: TritonLMError, answered_lately: bool) -> float:
        """How long to wait before the next try; or the error, where there will be none."""
        now = time.monotonic()
        if self._is_fault(error, answered_lately):
            self._broken_since = self._broken_since or now
        if self._broken_since is not None and isinstance(error, _WHILE_BROKEN):
            if now - self._broken_since > self._repair_seconds:
                raise Unavailable(
                    f"what broke was not brought back in {self._repair_seconds:g} s: {error.message}"
                ) from error
            return self._pause(_LONGEST_PAUSE_WHILE_BROKEN)
        if not isinstance(error, _RETRIED) or self._left <= 0:
            raise error
        self._left -= 1
        return self._pause(_LONGEST_PAUSE_SECONDS)

    def _is_fault(self, error: TritonLMError, answered_lately: bool) -> bool:
        """Whether something broke, that is: whether it will be brought back. At the beginning a refusal is none."""
        if isinstance(error, Broken):
            return True
        if self._last is not None:
            return isinstance(error, (Unavailable, Draining))
        return answered_lately and type(error) is Unavailable

    def _pause(self, longest: float) -> float:
        self._pauses += 1
        return min(_FIRST_PAUSE_SECONDS * 2.0 ** (self._pauses - 1), longest)
