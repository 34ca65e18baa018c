"""uvicorn's HTTP parser with limits on the size and the time of a request's head. `middleware` limits bodies."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 20.0


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose request head is too long or does not arrive in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The bytes of the current head; None while a body is read or a response is sent.
        self._head: int | None = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        # If the data ended the head and began the body, `_head` is None by now.
        if self._head is not None and self._head > MAX_HEAD_BYTES:
            self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_message_begin(self) -> None:
        # The next request on a kept-alive connection.
        if self._head is None:
            self._expect_head()
        super().on_message_begin()

    def _expect_head(self) -> None:
        self._head = 0
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _end_head(self) -> None:
        self._head = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
