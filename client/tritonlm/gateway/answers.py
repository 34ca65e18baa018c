"""From a call of the client to an HTTP answer, one JSON or server-sent events; the call ends when its caller leaves.

It knows HTTP and the client's streams, not what they carry.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse

from tritonlm.stream import AsyncStream
from tritonlm.types import ChatCompletion, Completion, Result

from .errors import body_of
from .middleware import Context, context_of

# Closing goes on after the request's own task was cancelled; the set keeps it from being collected.
_closing: set[asyncio.Task[None]] = set()


async def answer(request: Request, model: str, call: Coroutine[Any, Any, Any], ping_seconds: float) -> Response:
    """Await the call while its caller is there; stream what is a stream."""
    context = context_of(request.scope)
    found = await _unless_caller_leaves(request, context, call)
    if found is None:
        return Response(status_code=499)
    # Only now: a name that no model has must not become a label of the metrics.
    context.model = model
    if isinstance(found, AsyncStream):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventSourceResponse(_events(found, context), ping=ping_seconds, sep="\n", headers=headers)
    assert isinstance(found, (Completion, ChatCompletion))
    context.usage = found.usage
    return as_json(found)


def as_json(result: Result) -> Response:
    return Response(result.to_json(), media_type="application/json")


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


async def _events(stream: AsyncStream[Any], context: Context) -> AsyncIterator[dict[str, str]]:
    ended = False
    try:
        async for chunk in stream:
            yield {"data": chunk.to_json()}
        ended = True
        yield {"data": "[DONE]"}
    except Exception as error:
        ended = True
        yield {"data": json.dumps(body_of(error))}
    finally:
        context.usage, context.client_left = stream.usage(), not ended
        task = asyncio.get_running_loop().create_task(stream.close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
