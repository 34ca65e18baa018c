"""The attempts of one sequence: its state so far, and the call with which the next attempt resumes it after a fault.

The next attempt gets the tokens that have arrived and continues after them, so that a fault costs the caller only a
pause. This module knows neither connections nor which Triton is called.
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
from tritonlm.contract.backoff import doubled

# Nothing was computed before these errors, so a retry is safe.
_RETRYABLE = (Unavailable, Draining, QueueFull)
# Further errors that a process may return while it is restarted.
_RETRYABLE_DURING_REPAIR = (*_RETRYABLE, QueueTimeout, ModelNotFound)
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.1, 2.0
_MAX_REPAIR_PAUSE_SECONDS = 0.4
# An attempt that broke after this time was running: the fault before it had been repaired.
_RUNNING_SECONDS = 1.0


class Attempts:
    def __init__(self, call: Call, max_retries: int, repair_seconds: float) -> None:
        """`repair_seconds`: how long to wait for a broken Triton; the time restarts with each fault."""
        self._call = call
        self._deadline = time.monotonic() + call.timeout
        self._retries_left, self._repair_seconds = max_retries, repair_seconds
        self._count = self._pauses = 0
        self._broken_since: float | None = None
        self._started = time.monotonic()
        # The last piece as it was returned, and all tokens so far.
        self._last: Piece | None = None
        self._ids: list[int] = []
        self._next_index = 0

    def next_call(self) -> Call:
        """The call of the next attempt. It has its own id: the engine may still run the last one."""
        call = self._call
        parameters = dict(call.parameters)
        if call.stream:
            parameters["return_token_ids"] = True
        if self._ids:
            parameters["resume_token_ids"] = list(self._ids)
        request_id = f"{call.request_id}-{self._count}" if self._count else call.request_id
        self._started = time.monotonic()
        timeout = self._deadline - self._started
        if timeout <= 0:
            raise TimedOut.of_request()
        self._count += 1
        self._next_index = 0
        return replace(call, request_id=request_id, parameters=parameters, timeout=timeout)

    def accept(self, piece: Piece) -> Piece:
        """Renumber a piece of this attempt as a piece of the sequence."""
        if piece.index != self._next_index:
            raise Broken(f"received chunk {piece.index}, expected chunk {self._next_index}")
        self._next_index += 1
        self._broken_since, self._pauses = None, 0
        if self._call.stream:
            self._ids += piece.token_ids
        token_ids = piece.token_ids if self._call.parameters.get("return_token_ids") else []
        before = self._last
        index = 0 if before is None else before.index + 1
        # A later attempt finds the sequence's own prompt in the cache; only the first count is meaningful.
        cached = piece.cached_tokens if before is None else before.cached_tokens
        self._last = replace(piece, index=index, cached_tokens=cached, token_ids=token_ids)
        return self._last

    def pause_after(self, error: TritonLMError, responded_recently: bool) -> float:
        """How many seconds to wait before the next attempt; raises the error if there is none."""
        now = time.monotonic()
        if self._is_fault(error, responded_recently):
            ran = isinstance(error, Broken) and now - self._started >= _RUNNING_SECONDS
            self._broken_since = now if ran else self._broken_since or now
        if self._broken_since is not None and isinstance(error, _RETRYABLE_DURING_REPAIR):
            if now - self._broken_since > self._repair_seconds:
                raise Unavailable(f"Triton did not recover in {self._repair_seconds:g} s: {error.message}") from error
            return self._pause(_MAX_REPAIR_PAUSE_SECONDS)
        if not isinstance(error, _RETRYABLE) or self._retries_left <= 0:
            raise error
        self._retries_left -= 1
        return self._pause(_MAX_PAUSE_SECONDS)

    def _is_fault(self, error: TritonLMError, responded_recently: bool) -> bool:
        """Whether something broke that will be repaired. A refusal of the first attempt is not a fault."""
        if isinstance(error, Broken):
            return True
        if self._last is not None:
            return isinstance(error, (Unavailable, Draining))
        return responded_recently and type(error) is Unavailable

    def _pause(self, limit: float) -> float:
        self._pauses += 1
        return doubled(_FIRST_PAUSE_SECONDS, self._pauses - 1, limit)
