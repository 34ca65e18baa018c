"""Delivers chunks on a separate thread, in order, because a delivery may block. It does not know what they hold."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger("tritonlm.engine")

Send = Callable[[], None]


class Delivery:
    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Send | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine_delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, send: Send) -> None:
        self._waiting.put(send)

    def close(self) -> None:
        """End the thread after all waiting deliveries. Nothing may be put after it."""
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def flush(self) -> None:
        """Deliver everything that waits, on the caller's thread. For callers that step the engine themselves."""
        while not self._waiting.empty():
            send = self._waiting.get()
            assert send is not None
            _send_safely(send)

    def _run(self) -> None:
        while (send := self._waiting.get()) is not None:
            _send_safely(send)


def _send_safely(send: Send) -> None:
    try:
        send()
    except Exception:  # this caller is gone; the deliveries of the others continue
        _log.exception("a chunk could not be delivered")
