"""Turns a client call into an HTTP response: one JSON object, or server-sent events for a stream.

The call is cancelled when its caller disconnects. This module knows HTTP and the client's streams, not their content.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from tritonlm.client.stream import AsyncStream
from tritonlm.client.types import CompletionUsage, EmbeddingUsage, Result

from .history import CANCELLED, COMPLETED, FAILED, PROCESSING, Entry
from .http.errors import body_of
from .http.middleware import IGNORED_HEADER, RequestContext, context_of
from .services import services_of

# Unicode line breaks that JSON does not escape; many event-stream readers would split a line there.
_LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_MAX_HEADER = 1000
_CONTROL_CHARACTERS = dict.fromkeys((*range(32), 127), " ")
# Tasks that close a stream after the request's own task was cancelled; the set keeps a reference to them.
_closing: set[asyncio.Task[None]] = set()


Event = dict[str, str]


def event_data(value: str) -> str:
    """JSON as one line of an event."""
    return value.translate(_LINE_ENDS)


def named_events(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Events that are named by their type."""
    return [{"event": event["type"], "data": event_data(json.dumps(event, ensure_ascii=False))} for event in events]


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class ResponseFormat:
    """How results are serialized. The default is OpenAI's format."""

    complete: Callable[[Any, RequestContext], str] = lambda result, _: str(result.to_json())
    # The events before the first chunk, of a chunk, after the last one, and of an error instead of it.
    begin: Callable[[CompletionUsage | None], list[Event]] = lambda _: []
    chunk: Callable[[Any], list[Event]] = lambda chunk: [{"data": event_data(str(chunk.to_json()))}]
    end: Callable[[RequestContext], list[Event]] = lambda _: [{"data": "[DONE]"}]
    failure: Callable[[Exception], list[Event]] = lambda error: [{"data": json.dumps(body_of(error))}]
    # Awaited when the result is complete and before its end is sent.
    finish: Callable[[], Awaitable[None]] = _nothing
    # What keeps a silent stream alive; None: a comment.
    ping: Callable[[], ServerSentEvent] | None = None
    # What of the request was left out, beside what the result itself names.
    warnings: Sequence[str] = ()


OPENAI = ResponseFormat()


async def respond(
    request: Request,
    model: str,
    call_id: str,
    make_call: Callable[[], Coroutine[Any, Any, Any]],
    response_format: ResponseFormat = OPENAI,
) -> Response:
    """Run the call, loading its model first if needed, and return its result or its stream."""
    context, services = context_of(request.scope), await services_of(request)
    label = services.client.names.resolve(model).label
    entry = services.history.begin(call_id, model)
    try:
        result = await _until_disconnect(request, context, services.loader.call(model, make_call))
    except BaseException as error:
        entry.end(CANCELLED if isinstance(error, asyncio.CancelledError) else FAILED)
        raise
    if result is None:
        entry.end(CANCELLED)
        return Response(status_code=499)
    # Set only after success: an unknown model's name must not become a metrics label.
    context.model = label
    if isinstance(result, AsyncStream):
        entry.status, entry.started = PROCESSING, time.time()
        return EventSourceResponse(
            _events(result, context, entry, response_format),
            ping=services.settings.ping_seconds,
            sep="\n",
            ping_message_factory=response_format.ping,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **_ignored(result, response_format)},
            # A reader that stops reading blocks only its own stream, for a limited time.
            send_timeout=services.settings.reader_seconds,
        )
    _record_usage(context, entry, result.usage)
    entry.end(COMPLETED)
    text = response_format.complete(result, context)
    await response_format.finish()
    return Response(text, media_type="application/json", headers=_ignored(result, response_format))


def _ignored(result: Any, response_format: ResponseFormat) -> dict[str, str]:
    """The header that names what of the request was left out, for callers that do not read the body. It is bounded."""
    warnings = (*response_format.warnings, *(getattr(result, "warnings", None) or ()))
    text = "; ".join(warnings).encode("ascii", "replace").decode()[:_MAX_HEADER]
    # Names in it come from the caller, and uvicorn closes the connection at a control character.
    return {IGNORED_HEADER: text.translate(_CONTROL_CHARACTERS)} if text else {}


def json_response(result: Result) -> Response:
    return Response(result.to_json(), media_type="application/json")


def _record_usage(context: RequestContext, entry: Entry, usage: CompletionUsage | EmbeddingUsage | None) -> None:
    if isinstance(usage, EmbeddingUsage):
        tokens = usage.prompt_tokens
        usage = CompletionUsage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
    if usage is not None:
        context.usage = usage
        entry.prompt_tokens, entry.completion_tokens = usage.prompt_tokens, usage.completion_tokens


async def _until_disconnect(request: Request, context: RequestContext, call: Coroutine[Any, Any, Any]) -> Any:
    """The call's result. If the caller disconnects first, the call is cancelled and the result is None."""
    result = asyncio.ensure_future(call)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait([result, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        context.client_left = True
        return None
    finally:
        disconnect.cancel()
        if not result.done():
            result.cancel()
            await asyncio.wait([result])


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    stream: AsyncStream[Any], context: RequestContext, entry: Entry, response_format: ResponseFormat
) -> AsyncIterator[dict[str, str]]:
    status = CANCELLED
    try:
        has_begun = False
        async for chunk in stream:
            # The prompt's usage is known with the first chunk.
            first = [] if has_begun else response_format.begin(stream.usage())
            has_begun = True
            for event in (*first, *response_format.chunk(chunk)):
                yield event
        status = COMPLETED
        _record_usage(context, entry, stream.usage())
        last = response_format.end(context)
        await response_format.finish()
        for event in last:
            yield event
    except Exception as error:
        status = FAILED
        for event in response_format.failure(error):
            yield event
    finally:
        _record_usage(context, entry, stream.usage())
        entry.end(status)
        context.client_left = status == CANCELLED
        task = asyncio.get_running_loop().create_task(stream.close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
