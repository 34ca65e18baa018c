"""The request log: one log line per ended request, and trace spans if tracing is enabled.

It knows the times of a request and where to report them. It is called on the delivery thread.
"""

from __future__ import annotations

import logging
import os
import time

from tritonlm.contract import TritonLMError
from tritonlm.observability.tracing import ENDPOINT_VARIABLE, Tracing

from .engine.request import Item, Request

_log = logging.getLogger("tritonlm.engine.requests")


class RequestLog:
    def __init__(self, model: str) -> None:
        self._model = model
        endpoint = os.environ.get(ENDPOINT_VARIABLE, "")
        self._tracing = Tracing(endpoint, "tritonlm-engine") if endpoint else None

    @property
    def has_traces(self) -> bool:
        return self._tracing is not None

    def close(self) -> None:
        if self._tracing is not None:
            self._tracing.close()

    def write(self, request: Request, item: Item, traceparent: str) -> None:
        """Log an ended request. `item` is the last item that its caller received."""
        is_error = isinstance(item, TritonLMError)
        reason = type(item).__name__ if is_error else getattr(item, "finish_reason", "embedded")
        phases = _phases(request)
        tokens = {
            "prompt_tokens": len(request.prompt_ids),
            "cached_tokens": request.cached_tokens,
            "completion_tokens": request.generated,
        }
        seconds = {f"{name}_seconds": round(end - start, 6) for name, start, end in phases}
        _log.info(
            "%s: %s, %d in, %d out%s",
            request.id,
            reason,
            len(request.prompt_ids),
            request.generated,
            "".join(f", {name} {end - start:.3f} s" for name, start, end in phases),
            extra={"request_id": request.id, "model": self._model, "finish_reason": reason, **tokens, **seconds},
        )
        if self._tracing is not None and phases:
            self._trace(request, phases, traceparent, {"request_id": request.id, "finish_reason": reason, **tokens})

    def _trace(
        self,
        request: Request,
        phases: list[tuple[str, float, float]],
        traceparent: str,
        attributes: dict[str, str | int | float],
    ) -> None:
        assert self._tracing is not None
        # From the monotonic clock to the time of day.
        offset = time.time() - time.monotonic()
        root = self._tracing.add(
            f"engine {self._model}", traceparent, phases[0][1] + offset, phases[-1][2] + offset, attributes
        )
        for name, start, end in phases:
            self._tracing.add(name, root, start + offset, end + offset)


def _phases(request: Request) -> list[tuple[str, float, float]]:
    """The phases that the request reached, with start and end: queue, prefill, decode."""
    ended = request.ended_at or time.monotonic()
    times = [request.arrived_at, request.prefill_started_at, request.first_token_at]
    starts = [moment for moment in times if moment is not None]
    return [
        (name, start, end)
        for name, start, end in zip(("queue", "prefill", "decode"), starts, [*starts[1:], ended], strict=False)
    ]
