"""HTTP's parser with bounds on a request's head: so many bytes, in so many seconds. Bodies are bounded elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 20.0


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection that sends a head without end, or none."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # Of the head that is being read; None while there is a body, or an answer.
        self._head: int | None = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        # More than that may have come at once, with a body behind the head: then the head has been read.
        if self._head is not None and self._head > MAX_HEAD_BYTES:
            self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._head_is_read()
        super().on_headers_complete()

    def on_message_begin(self) -> None:
        # The next one on a connection that is kept.
        if self._head is None:
            self._expect_head()
        super().on_message_begin()

    def _expect_head(self) -> None:
        self._head = 0
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _head_is_read(self) -> None:
        self._head = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
