"""Middleware for every request: its id, the limits on its body, its log line, its metrics and its trace span.

Plain ASGI, so that streams are not buffered. It knows no routes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlm.client.types import CompletionUsage
from tritonlm.observability.tracing import TRACEPARENT, Tracing, current, traceparent_of

from .. import metrics
from . import protocol
from .errors import internal_response

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger("tritonlm.access")
REQUEST_ID = "x-request-id"
# Anthropic's libraries read it under another name.
REQUEST_IDS = (REQUEST_ID, "request-id")
# Names the fields of a request that had no effect.
IGNORED_HEADER = "x-tritonlm-ignored"
# The route whose body is a file, and what the form around the file may take.
UPLOAD_PATH, _FORM_BYTES = "/v1/files", 64 * 1024
# What a caller has to send of a body in a second, on average: less than any line offers.
_MIN_BYTES_PER_SECOND = 16 * 1024
# OpenAI's libraries send the number of their earlier attempts.
_RETRY_COUNT = "x-stainless-retry-count"
# GET requests for health and metrics are too frequent to trace.
_TRACED_METHODS = ("POST", "DELETE")
_VALID_ID = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


@dataclass
class RequestContext:
    """Facts about a request beyond HTTP. Routes add to it."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    model: str = ""
    # The name of the caller's key.
    caller: str = ""
    usage: CompletionUsage | None = None
    first_byte: float | None = None
    client_left: bool = False


def context_of(scope: Scope) -> RequestContext:
    context = scope["state"]["context"]
    assert isinstance(context, RequestContext)
    return context


class RequestMiddleware:
    def __init__(self, app: ASGIApp, max_body_bytes: int, max_file_bytes: int, tracing: Tracing | None = None) -> None:
        self._app, self._max_body_bytes, self._tracing = app, max_body_bytes, tracing
        self._max_upload_bytes = max_file_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get(REQUEST_ID, "")
        context = RequestContext(sent_id if _VALID_ID.fullmatch(sent_id) else secrets.token_hex(12))
        scope.setdefault("state", {})["context"] = context
        _accept_curl_json(scope)
        span, status = self._begin_span(scope), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(dict.fromkeys(REQUEST_IDS, context.request_id))
            elif context.first_byte is None:
                context.first_byte = time.monotonic()
            await send(message)

        try:
            limit = self._max_upload_bytes if scope["path"] == UPLOAD_PATH else self._max_body_bytes
            await self._app(scope, _limited(receive, limit), send_with_id)
        finally:
            status = 499 if context.client_left else status
            _finish(scope, context, status)
            if span is not None:
                _end_span(span, scope, context, status)

    def _begin_span(self, scope: Scope) -> Span | None:
        """Start the request's span, in the caller's trace if it sent one, and make it the current trace."""
        if self._tracing is None or scope["method"] not in _TRACED_METHODS:
            return None
        span = self._tracing.begin(scope["method"], Headers(scope=scope).get(TRACEPARENT, ""))
        current.set(traceparent_of(span))
        return span


class InternalErrorMiddleware:
    """Answers a request whose route fails.

    A handler of the application for all exceptions would run outside the other middleware, so that its response has
    neither the request's id nor the headers for pages of other origins, and the server closes its connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def observed_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            if scope["type"] != "http":
                raise
            _log.exception("%s %r failed [%s]", scope["method"], scope["path"], context_of(scope).request_id)
            if has_started:
                raise
            await internal_response(scope["path"])(scope, receive, send)


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive`, with an error when the body exceeds the limit, or does not arrive in time: each part has as long as a
    head, and a small body has this time as a whole."""
    total, waited, is_whole = 0, 0.0, False

    async def limited_receive() -> Message:
        nonlocal total, waited, is_whole
        if is_whole:
            # It waits for the caller's disconnect.
            return await receive()
        seconds = protocol.HEAD_SECONDS
        began = time.monotonic()
        try:
            left = min(seconds, seconds + total / _MIN_BYTES_PER_SECOND - waited)
            message = await asyncio.wait_for(receive(), left)
        except (TimeoutError, asyncio.TimeoutError):
            # The connection is of no use: the rest of the body may still come.
            raise HTTPException(408, "the body did not arrive in time", {"Connection": "close"}) from None
        waited += time.monotonic() - began
        is_whole = not message.get("more_body", False)
        total += len(message.get("body", b""))
        if total > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        return message

    return limited_receive


def _accept_curl_json(scope: Scope) -> None:
    """`curl -d` labels every body as a form; treat it as JSON, unless a browser page sent it.

    A page can send a form to this machine without a preflight; its requests have an Origin header.
    """
    headers = MutableHeaders(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and "origin" not in headers and kind in ("", "application/x-www-form-urlencoded"):
        headers["content-type"] = "application/json"


def _route_of(scope: Scope) -> str:
    """The route's pattern. The path itself is the caller's text and must not become a metrics label."""
    route = scope.get("route")
    # A request that was refused before the routes has none yet. A preflight is no request for its route.
    if route is None and scope["method"] != "OPTIONS" and "app" in scope:
        route = next((known for known in scope["app"].routes if known.matches(scope)[0] is not Match.NONE), None)
    # Starlette's `{name:path}` is OpenAPI's `{name}`.
    return str(getattr(route, "path", "other")).replace(":path}", "}")


def _finish(scope: Scope, context: RequestContext, status: int) -> None:
    """Record the request's metrics and write its log line."""
    seconds = time.monotonic() - context.started
    if Headers(scope=scope).get(_RETRY_COUNT, "0") != "0":
        metrics.record_retried()
    route = _route_of(scope)
    first = None if context.first_byte is None else context.first_byte - context.started
    metrics.record(route, context.model, status, seconds, first, context.usage)
    line = f"{scope['method']} {scope['path']!r} {status}"
    fields: dict[str, object] = {
        "request_id": context.request_id, "method": scope["method"], "path": scope["path"], "route": route,
        "status": status, "seconds": round(seconds, 6), "model": context.model, "key": context.caller,
    }  # fmt: skip
    if context.usage is not None and seconds > 0:
        tokens = context.usage.completion_tokens
        line += f" ✓ Generated {tokens} tokens in {seconds:.2f}s ({tokens / seconds:.1f} tok/s)"
        line += f" from {context.usage.prompt_tokens}, {context.model}"
        fields |= {"prompt_tokens": context.usage.prompt_tokens, "completion_tokens": tokens}
        fields |= {"cached_tokens": context.usage.prompt_tokens_details.cached_tokens}
    else:
        line += f" {seconds:.3f} s"
    if first is not None:
        fields["first_byte_seconds"] = round(first, 6)
    if context.caller:
        line += f", {context.caller}"
    _log.info("%s [%s]", line, context.request_id, extra={n: value for n, value in fields.items() if value != ""})


def _end_span(span: Span, scope: Scope, context: RequestContext, status: int) -> None:
    route = _route_of(scope)
    span.update_name(f"{scope['method']} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status, "request_id": context.request_id})
    if context.model:
        span.set_attribute("model", context.model)
    if context.usage is not None:
        span.set_attribute("prompt_tokens", context.usage.prompt_tokens)
        span.set_attribute("completion_tokens", context.usage.completion_tokens)
    span.end()
