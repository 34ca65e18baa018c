"""Hands things over on a thread of its own, in order: handing over may block. It does not know what they are."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger("tritonlm.engine")

HandOver = Callable[[], None]


class Delivery:
    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[HandOver | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine_delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, hand_over: HandOver) -> None:
        self._waiting.put(hand_over)

    def end(self) -> None:
        """After what is waiting; nothing may be put after it."""
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def now(self) -> None:
        """Hand over what is ready, on the caller's thread: for those who step the engine themselves."""
        while not self._waiting.empty():
            hand_over = self._waiting.get()
            assert hand_over is not None
            _try(hand_over)

    def _run(self) -> None:
        while (hand_over := self._waiting.get()) is not None:
            _try(hand_over)


def _try(hand_over: HandOver) -> None:
    try:
        hand_over()
    except Exception:  # its caller is gone; the others' chunks must go on
        _log.exception("a chunk could not be delivered")
