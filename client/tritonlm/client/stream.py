"""Streams: the pieces of one or many sequences as they arrive, and the objects built from them.

A stream is an iterator and a context manager; leaving it early cancels the running sequences. It knows no connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Generic, TypeVar

from tritonlm.client.types import CompletionUsage, Piece

T = TypeVar("T")
Source = AsyncGenerator[Piece, None]
# Pieces buffered for a slow reader, over all sequences of a call. When the buffer is full, reading pauses.
_BUFFERED_PIECES = 64
# A call of several sequences starts when each has sent a piece, or this long after the first one: the others may wait
# for a slot. It starts earlier when the buffer is full.
_START_SECONDS = 1.0

_Item = tuple[int, "Piece | Exception | None"]


class MergedSources:
    """Merges several sources in the order of arrival. The first error ends all of them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(_BUFFERED_PIECES)
        self._early: deque[_Item] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(sources)

    async def start(self) -> None:
        """Start all sources. An error at the beginning of a source is raised here."""
        if len(self._sources) == 1:
            try:
                self._early.append((0, await self._sources[0].__anext__()))
            except StopAsyncIteration:
                self._running = 0
            return
        self._tasks = [
            asyncio.create_task(_pump(self._queue, number, source)) for number, source in enumerate(self._sources)
        ]
        started: set[int] = set()
        deadline: float | None = None
        clock, room = asyncio.get_running_loop().time, len(self._sources) + _BUFFERED_PIECES
        try:
            while len(started) < len(self._sources) and len(self._early) < room:
                item = await asyncio.wait_for(self._queue.get(), None if deadline is None else deadline - clock())
                if isinstance(item[1], Exception):
                    raise item[1]
                started.add(item[0])
                self._early.append(item)
                deadline = deadline or clock() + _START_SECONDS
        except (asyncio.TimeoutError, TimeoutError):
            return
        except BaseException:
            await self.close()
            raise

    async def next(self) -> tuple[int, Piece] | None:
        """The number of a source and its next piece; None after the last piece."""
        while self._running:
            if len(self._sources) == 1 and not self._early:
                return await self._next_of_one()
            number, item = self._early.popleft() if self._early else await self._queue.get()
            if not self._running:
                # Another task has closed the stream meanwhile.
                return None
            if isinstance(item, Piece):
                return number, item
            if item is not None:
                await self.close()
                raise item
            self._running -= 1
        return None

    async def _next_of_one(self) -> tuple[int, Piece] | None:
        (source,) = self._sources
        try:
            piece = await source.__anext__()
        except StopAsyncIteration:
            self._running = 0
            return None
        if not self._running:
            # Another task has closed the stream meanwhile. It could not close a source that was being read.
            await source.aclose()
            return None
        return 0, piece

    async def close(self) -> None:
        self._running = 0
        # A task that waits for a piece learns of it: the queue is empty then.
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait((0, None))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for source in self._sources:
            # A source that never started has nothing to close; one that another task reads is closed by that task.
            with contextlib.suppress(RuntimeError):
                await source.aclose()

    def __del__(self) -> None:
        """Cancel the tasks of a stream that was dropped without `close`."""
        pending = [task for task in self._tasks if not task.done()]
        if pending and not (loop := pending[0].get_loop()).is_closed():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in pending])


async def _pump(queue: asyncio.Queue[_Item], number: int, source: Source) -> None:
    # Not a method: a reference to the stream would keep it from being garbage collected.
    try:
        async for piece in source:
            await queue.put((number, piece))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
    finally:
        await source.aclose()


class AsyncStream(Generic[T]):
    """The result of `create(stream=True)`. Use `async for`, inside `async with` if you may leave it early."""

    def __init__(
        self,
        request_id: str,
        merged: MergedSources,
        make: Callable[[int, Piece], T | None],
        at_end: Callable[[], T | None],
        on_close: Callable[[], None],
        usage: Callable[[], CompletionUsage | None] = lambda: None,
    ) -> None:
        """`make` may return None for a piece: it is left out of the stream."""
        self.request_id = request_id
        # What of the request was left out.
        self.warnings: tuple[str, ...] = ()
        # Returns the tokens so far.
        self.usage = usage
        self._merged, self._make, self._at_end, self._on_close = merged, make, at_end, on_close
        self._ended = False

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        if self._ended:
            raise StopAsyncIteration
        try:
            while (item := await self._merged.next()) is not None:
                if (made := self._make(*item)) is not None:
                    return made
        except BaseException:
            await self.close()
            raise
        await self.close()
        last = self._at_end()
        if last is None:
            raise StopAsyncIteration
        return last

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel the running sequences. May be called at any time and repeatedly."""
        self._ended = True
        self._on_close()
        await self._merged.close()
