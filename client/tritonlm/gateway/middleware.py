"""What surrounds every request: its id, the limit on its body, its line in the log, its counters.

Plain ASGI, so that nothing buffers a stream. It knows no routes.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlm.client.types import CompletionUsage
from tritonlm.observability.tracing import TRACEPARENT, Tracing, current, name_of

from . import metrics

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger("tritonlm.access")
REQUEST_ID = "x-request-id"
# OpenAI's libraries say how often they have tried before.
_RETRIES = "x-stainless-retry-count"
# Looks at health and metrics come so often that nothing else would be found among their traces.
_TRACED = ("POST", "DELETE")
_SANE_ID = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


@dataclass
class Context:
    """What is known of a request beside HTTP; routes add to it."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    model: str = ""
    # The name of the key that was sent.
    caller: str = ""
    usage: CompletionUsage | None = None
    first_byte: float | None = None
    client_left: bool = False


def context_of(scope: Scope) -> Context:
    found = scope["state"]["context"]
    assert isinstance(found, Context)
    return found


class Surroundings:
    def __init__(self, app: ASGIApp, max_body_bytes: int, tracing: Tracing | None = None) -> None:
        self._app, self._max_body_bytes, self._tracing = app, max_body_bytes, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        context = Context(given if _SANE_ID.fullmatch(given) else secrets.token_hex(12))
        scope.setdefault("state", {})["context"] = context
        _take_curls_word(scope)
        span = self._begin_span(scope)
        read, status = 0, 500

        async def bounded_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes")
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = context.request_id
            elif context.first_byte is None:
                context.first_byte = time.monotonic()
            await send(message)

        try:
            await self._app(scope, bounded_receive, marked_send)
        finally:
            status = 499 if context.client_left else status
            _finish(scope, context, status)
            if span is not None:
                _end_span(span, scope, context, status)

    def _begin_span(self, scope: Scope) -> Span | None:
        """What is called on the way of this request belongs to its trace, or to its caller's."""
        if self._tracing is None or scope["method"] not in _TRACED:
            return None
        span = self._tracing.begin(scope["method"], Headers(scope=scope).get(TRACEPARENT, ""))
        current.set(name_of(span))
        return span


def _take_curls_word(scope: Scope) -> None:
    """`curl -d` calls every body a form. Ours are JSON, so take it as that; but not from a browser's page.

    A page could send a form to this machine without asking; a page's request has an origin.
    """
    headers = MutableHeaders(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and "origin" not in headers and kind in ("", "application/x-www-form-urlencoded"):
        headers["content-type"] = "application/json"


def _finish(scope: Scope, context: Context, status: int) -> None:
    seconds = time.monotonic() - context.started
    # The route's pattern, not the path: paths are anybody's.
    if Headers(scope=scope).get(_RETRIES, "0") != "0":
        metrics.record_retried()
    route = getattr(scope.get("route"), "path", "other")
    first = None if context.first_byte is None else context.first_byte - context.started
    metrics.record(route, context.model, status, seconds, first, context.usage)
    said = f"{scope['method']} {scope['path']!r} {status}"
    fields: dict[str, object] = {
        "request_id": context.request_id, "method": scope["method"], "path": scope["path"], "route": route,
        "status": status, "seconds": round(seconds, 6), "model": context.model, "key": context.caller,
    }  # fmt: skip
    if context.usage is not None and seconds > 0:
        tokens = context.usage.completion_tokens
        said += f" ✓ Generated {tokens} tokens in {seconds:.2f}s ({tokens / seconds:.1f} tok/s)"
        said += f" from {context.usage.prompt_tokens}, {context.model}"
        fields |= {"prompt_tokens": context.usage.prompt_tokens, "completion_tokens": tokens}
        fields |= {"cached_tokens": context.usage.prompt_tokens_details.cached_tokens}
    else:
        said += f" {seconds:.3f} s"
    if first is not None:
        fields["first_byte_seconds"] = round(first, 6)
    if context.caller:
        said += f", {context.caller}"
    _log.info("%s [%s]", said, context.request_id, extra={n: value for n, value in fields.items() if value != ""})


def _end_span(span: Span, scope: Scope, context: Context, status: int) -> None:
    route = getattr(scope.get("route"), "path", "other")
    span.update_name(f"{scope['method']} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status, "request_id": context.request_id})
    if context.model:
        span.set_attribute("model", context.model)
    if context.usage is not None:
        span.set_attribute("prompt_tokens", context.usage.prompt_tokens)
        span.set_attribute("completion_tokens", context.usage.completion_tokens)
    span.end()
