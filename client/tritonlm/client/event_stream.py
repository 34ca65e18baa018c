"""Streams of other APIs' events: each chunk of a chat becomes some of them. It knows no API and no connections."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tritonlm.client.stream import AsyncStream
from tritonlm.client.types import ChatCompletionChunk, CompletionUsage
from tritonlm.contract import Cancelled, TritonLMError

E = TypeVar("E")
R = TypeVar("R")
_Events = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class EventFormat(Generic[E, R]):
    """How an API writes a chat: the events before the first chunk, of a chunk, and after the last one."""

    begin: Callable[[CompletionUsage | None], _Events]
    chunk: Callable[[ChatCompletionChunk], _Events]
    end: Callable[[CompletionUsage | None], _Events]
    event: Callable[[Mapping[str, Any]], E]
    # The whole result, after the end.
    result: Callable[[], R]
    # An error with the field names of the API.
    error: Callable[[TritonLMError], TritonLMError]


class AsyncEventStream(Generic[E, R]):
    """Use `async for`, inside `async with` if you may leave it early; `final` is the result as without a stream."""

    def __init__(self, chunks: AsyncStream[ChatCompletionChunk], event_format: EventFormat[E, R]) -> None:
        self.request_id, self.usage = chunks.request_id, chunks.usage
        self._chunks, self._format = chunks, event_format
        self._events: deque[E] = deque()
        self._has_begun = self._is_complete = self._ended = False

    def __aiter__(self) -> AsyncEventStream[E, R]:
        return self

    async def __anext__(self) -> E:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            await self._read()
        return self._events.popleft()

    async def _read(self) -> None:
        try:
            chunk = await anext(self._chunks, None)
        except TritonLMError as error:
            self._ended = True
            raise self._format.error(error) from None
        if chunk is None:
            self._ended = self._is_complete = True
            self._add(self._format.end(self.usage()))
            return
        if not self._has_begun:
            self._has_begun = True
            self._add(self._format.begin(self.usage()))
        self._add(self._format.chunk(chunk))

    def _add(self, events: _Events) -> None:
        self._events.extend(self._format.event(event) for event in events)

    async def final(self) -> R:
        """Read to the end; the whole result."""
        while not self._ended:
            await self._read()
        if not self._is_complete:
            raise Cancelled("the stream ended before its result was complete")
        return self._format.result()

    async def __aenter__(self) -> AsyncEventStream[E, R]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel the running request. May be called at any time and repeatedly."""
        self._ended = True
        await self._chunks.close()
