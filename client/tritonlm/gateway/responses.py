"""Turns a client call into an HTTP response: one JSON object, or server-sent events for a stream.

The call is cancelled when its caller disconnects. This module knows HTTP and the client's streams, not their content.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse

from tritonlm.client.stream import AsyncStream
from tritonlm.client.types import CompletionUsage, EmbeddingUsage, Result

from .errors import body_of
from .history import CANCELLED, COMPLETED, FAILED, PROCESSING, Entry
from .middleware import RequestContext, context_of
from .services import services_of

# Unicode line breaks that JSON does not escape; many event-stream readers would split a line there.
_LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
IGNORED_HEADER = "x-tritonlm-ignored"
# Tasks that close a stream after the request's own task was cancelled; the set keeps a reference to them.
_closing: set[asyncio.Task[None]] = set()


@dataclass(frozen=True)
class ResponseFormat:
    """How results are serialized. The default is OpenAI's format."""

    complete: Callable[[Any, RequestContext], str] = lambda result, _: str(result.to_json())
    # None: this chunk is not sent.
    chunk: Callable[[Any], str | None] = lambda chunk: str(chunk.to_json()).translate(_LINE_ENDS)
    end: Callable[[RequestContext], dict[str, str]] = lambda _: {"data": "[DONE]"}


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
    context.model = model
    if isinstance(result, AsyncStream):
        entry.status, entry.started = PROCESSING, time.time()
        return EventSourceResponse(
            _events(result, context, entry, response_format),
            ping=services.settings.ping_seconds,
            sep="\n",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **_ignored(result.warnings)},
            # A reader that stops reading blocks only its own stream, for a limited time.
            send_timeout=services.settings.reader_seconds,
        )
    _record_usage(context, entry, result.usage)
    entry.end(COMPLETED)
    headers = _ignored(getattr(result, "warnings", None) or ())
    return Response(response_format.complete(result, context), media_type="application/json", headers=headers)


def _ignored(warnings: Sequence[str]) -> dict[str, str]:
    """The header that names what of the request was left out."""
    return {IGNORED_HEADER: "; ".join(warnings).encode("ascii", "replace").decode()} if warnings else {}


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
        async for chunk in stream:
            if (data := response_format.chunk(chunk)) is not None:
                yield {"data": data}
        status = COMPLETED
        _record_usage(context, entry, stream.usage())
        yield response_format.end(context)
    except Exception as error:
        status = FAILED
        yield {"data": json.dumps(body_of(error))}
    finally:
        _record_usage(context, entry, stream.usage())
        entry.end(status)
        context.client_left = status == CANCELLED
        task = asyncio.get_running_loop().create_task(stream.close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
