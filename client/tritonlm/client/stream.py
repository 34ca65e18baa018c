"""Streams: the pieces of one or many sequences as they come, and the objects made of them.

A stream is an iterator and a context; leaving it early cancels what is still running. It knows no connections.
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
# Pieces that may wait for a slow reader, over all sequences of a call; after that the engine's chunks wait.
_WAITING_PIECES = 64
# A call of several sequences begins when each has said something, or so long after the first did.
_START_SECONDS = 1.0

_Item = tuple[int, "Piece | Exception | None"]


class Merged:
    """Several sources as one, in the order of arrival. The first error ends them all."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(_WAITING_PIECES)
        self._early: deque[_Item] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(sources)

    async def start(self) -> None:
        """Begin. An error that comes at the beginning of any source is raised here."""
        if len(self._sources) == 1:
            try:
                self._early.append((0, await self._sources[0].__anext__()))
            except StopAsyncIteration:
                self._running = 0
            return
        self._tasks = [
            asyncio.create_task(_pump(self._queue, number, source)) for number, source in enumerate(self._sources)
        ]
        heard: set[int] = set()
        patience: float | None = None
        try:
            while len(heard) < len(self._sources):
                item = await asyncio.wait_for(self._queue.get(), patience)
                if isinstance(item[1], Exception):
                    raise item[1]
                heard.add(item[0])
                self._early.append(item)
                patience = _START_SECONDS
        except (asyncio.TimeoutError, TimeoutError):
            return
        except BaseException:
            await self.close()
            raise

    async def next(self) -> tuple[int, Piece] | None:
        """The next piece and the number of its source; None after the last."""
        while self._running:
            if len(self._sources) == 1 and not self._early:
                try:
                    return 0, await self._sources[0].__anext__()
                except StopAsyncIteration:
                    self._running = 0
                    return None
            number, found = self._early.popleft() if self._early else await self._queue.get()
            if isinstance(found, Piece):
                return number, found
            if found is not None:
                await self.close()
                raise found
            self._running -= 1
        return None

    async def close(self) -> None:
        self._running = 0
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for source in self._sources:
            # A source that never began has nothing to close.
            with contextlib.suppress(RuntimeError):
                await source.aclose()

    def __del__(self) -> None:
        """Dropped without a close: the loop ends the pumps, as it does with a lone generator that is dropped."""
        pending = [task for task in self._tasks if not task.done()]
        if pending and not (loop := pending[0].get_loop()).is_closed():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in pending])


async def _pump(queue: asyncio.Queue[_Item], number: int, source: Source) -> None:
    # Not a method: a reference to the stream would keep it from noticing that it was dropped.
    try:
        async for piece in source:
            await queue.put((number, piece))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
    finally:
        await source.aclose()


class AsyncStream(Generic[T]):
    """What `create(stream=True)` gives: `async for`, inside `async with` where it may be left early."""

    def __init__(
        self,
        request_id: str,
        merged: Merged,
        make: Callable[[int, Piece], T],
        at_end: Callable[[], T | None],
        when_closed: Callable[[], None],
        usage: Callable[[], CompletionUsage | None] = lambda: None,
    ) -> None:
        self.request_id = request_id
        # Tokens so far.
        self.usage = usage
        self._merged, self._make, self._at_end, self._when_closed = merged, make, at_end, when_closed
        self._ended = False

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        if self._ended:
            raise StopAsyncIteration
        try:
            found = await self._merged.next()
            if found is not None:
                return self._make(*found)
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
        """Cancel what is still running. May be called at any time, and twice."""
        self._ended = True
        self._when_closed()
        await self._merged.close()
