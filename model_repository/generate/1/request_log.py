"""What is told of a request that has ended: a line in the log, and spans of its trace where traces are wanted.

It knows the moments of a request and where to tell them; it is called on the delivering thread.
"""

from __future__ import annotations

import logging
import os
import time

from tritonlm.contract import TritonLMError
from tritonlm.observability.tracing import ENDPOINT_VARIABLE, Tracing

from .engine.request import Item, Request

_log = logging.getLogger("tritonlm.engine.requests")


class Accounts:
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

    def settle(self, request: Request, item: Item, traceparent: str) -> None:
        """`item`: the last that its caller is given."""
        how = type(item).__name__ if isinstance(item, TritonLMError) else getattr(item, "finish_reason", "embedded")
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
            how,
            len(request.prompt_ids),
            request.generated,
            "".join(f", {name} {end - start:.3f} s" for name, start, end in phases),
            extra={"request_id": request.id, "model": self._model, "finish_reason": how, **tokens, **seconds},
        )
        if self._tracing is not None and phases:
            self._trace(request, phases, traceparent, {"request_id": request.id, "finish_reason": how, **tokens})

    def _trace(
        self,
        request: Request,
        phases: list[tuple[str, float, float]],
        traceparent: str,
        attributes: dict[str, str | int | float],
    ) -> None:
        assert self._tracing is not None
        # From the clock of the moments to the calendar's.
        offset = time.time() - time.monotonic()
        whole = self._tracing.add(
            f"engine {self._model}", traceparent, phases[0][1] + offset, phases[-1][2] + offset, attributes
        )
        for name, start, end in phases:
            self._tracing.add(name, whole, start + offset, end + offset)


def _phases(request: Request) -> list[tuple[str, float, float]]:
    """Waiting, reading the prompt, generating: as far as it came."""
    ended = request.ended or time.monotonic()
    moments = [request.arrived, request.began, request.answered, ended]
    known = [moment for moment in moments[:3] if moment is not None]
    return [
        (name, start, end)
        for name, start, end in zip(("queue", "prefill", "decode"), known, [*known[1:], ended], strict=False)
    ]
