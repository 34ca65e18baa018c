"""From a call of the client to an HTTP answer, one JSON or server-sent events; the call ends when its caller leaves.

It knows HTTP and the client's streams, not what they carry.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse

from tritonlm.client.stream import AsyncStream
from tritonlm.client.types import CompletionUsage, EmbeddingUsage, Result

from .errors import body_of
from .history import CANCELLED, COMPLETED, FAILED, PROCESSING, Entry
from .middleware import Context, context_of

# What Unicode calls a line's end and JSON does not escape: many readers of events would cut a line there.
_LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
# Closing goes on after the request's own task was cancelled; the set keeps it from being collected.
_closing: set[asyncio.Task[None]] = set()


@dataclass(frozen=True)
class Shape:
    """How results are written: OpenAI's way unless a route has its own."""

    whole: Callable[[Any, Context], str] = lambda result, _: str(result.to_json())
    # None: nothing to send for this chunk.
    chunk: Callable[[Any], str | None] = lambda chunk: str(chunk.to_json()).translate(_LINE_ENDS)
    end: Callable[[Context], dict[str, str]] = lambda _: {"data": "[DONE]"}


OPENAI = Shape()


async def answer(
    request: Request, model: str, call_id: str, make: Callable[[], Coroutine[Any, Any, Any]], shape: Shape = OPENAI
) -> Response:
    """Await the call while its caller is there, its model loaded first if need be; stream what is a stream."""
    context, history = context_of(request.scope), request.app.state.history
    entry = history.begin(call_id, model)
    try:
        found = await _unless_caller_leaves(request, context, request.app.state.loader.call(model, make))
    except BaseException as error:
        entry.end(CANCELLED if isinstance(error, asyncio.CancelledError) else FAILED)
        raise
    if found is None:
        entry.end(CANCELLED)
        return Response(status_code=499)
    # Only now: a name that no model has must not become a label of the metrics.
    context.model = model
    if isinstance(found, AsyncStream):
        entry.status, entry.started = PROCESSING, time.time()
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        chosen = request.app.state.settings
        return EventSourceResponse(
            _events(found, context, entry, shape),
            ping=chosen.ping_seconds,
            sep="\n",
            headers=headers,
            # Who stops reading holds up its own stream only, and not for ever.
            send_timeout=chosen.reader_seconds,
        )
    _note_usage(context, entry, found.usage)
    entry.end(COMPLETED)
    return Response(shape.whole(found, context), media_type="application/json")


def as_json(result: Result) -> Response:
    return Response(result.to_json(), media_type="application/json")


def _note_usage(context: Context, entry: Entry, usage: CompletionUsage | EmbeddingUsage | None) -> None:
    if isinstance(usage, EmbeddingUsage):
        tokens = usage.prompt_tokens
        usage = CompletionUsage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
    if usage is not None:
        context.usage = usage
        entry.prompt_tokens, entry.completion_tokens = usage.prompt_tokens, usage.completion_tokens


async def _unless_caller_leaves(request: Request, context: Context, call: Coroutine[Any, Any, Any]) -> Any:
    """The call's result; None when the caller left first, whose requests are cancelled then."""
    work = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        context.client_left = True
        return None
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait([work])


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    stream: AsyncStream[Any], context: Context, entry: Entry, shape: Shape
) -> AsyncIterator[dict[str, str]]:
    status = CANCELLED
    try:
        async for chunk in stream:
            if (data := shape.chunk(chunk)) is not None:
                yield {"data": data}
        status = COMPLETED
        _note_usage(context, entry, stream.usage())
        yield shape.end(context)
    except Exception as error:
        status = FAILED
        yield {"data": json.dumps(body_of(error))}
    finally:
        _note_usage(context, entry, stream.usage())
        entry.end(status)
        context.client_left = status == CANCELLED
        task = asyncio.get_running_loop().create_task(stream.close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
