"""An event loop on a daemon thread, on which blocking calls run coroutines. It does not know what they do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from tritonlm.contract import Cancelled

T = TypeVar("T")
_CLOSE_SECONDS = 40.0


class BackgroundLoop:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Held while work is added: after the loop has stopped nobody would run it, and its caller would wait for ever.
        self._adding = threading.Lock()
        self.is_closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="tritonlm-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        with self._adding:
            if self.is_closed:
                work.close()
                raise RuntimeError("the client is closed; make another one")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except (KeyboardInterrupt, concurrent.futures.TimeoutError):
            # Nobody waits for the result any more.
            future.cancel()
            raise
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed during this call") from None

    def close(self) -> None:
        """Cancel the work of other threads, so that they do not wait any more, and end. May be called repeatedly."""
        with self._adding:
            if self.is_closed:
                return
            self.is_closed = True
            cancelled = asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)
        concurrent.futures.wait([cancelled], _CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=_CLOSE_SECONDS)
