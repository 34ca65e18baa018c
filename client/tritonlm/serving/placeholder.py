"""The gateway's port, open from the command's first moment. Until the gateway answers there, whoever asks hears 503.

The sockets are the supervisor's, and every gateway gets them: where one has died, who comes waits for the next one. It
does not know what the gateway is or when it starts; it attends until somebody takes over.
"""

from __future__ import annotations

import json
import os
import selectors
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from types import TracebackType
from typing import Any

from tritonlm.contract.errors import Unavailable

from .ports import listen

_MOST_CALLERS = 64
_CALLER_SECONDS = 2.0
_LONGEST_BODY = 2**20
_STARTING = Unavailable("tritonlm is starting; its language models are not loaded yet")
_ANSWER = json.dumps(
    {"error": {"message": _STARTING.message, "type": _STARTING.openai_type, "param": None, "code": _STARTING.code}}
).encode()


class Reception:
    """A context: inside it the port is open, and after it closed as far as this process is concerned."""

    def __init__(self, host: str, port: int) -> None:
        self._sockets = listen(host, port, "the gateway", "port")
        # Whoever takes over closes the other end, or has it closed by his own.
        self._taken, self._baton = os.pipe()
        self._attending = threading.Thread(target=self._attend, name="reception", daemon=True)
        self._attending.start()

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def sockets(self) -> list[int]:
        return [opened.fileno() for opened in self._sockets]

    @property
    def baton(self) -> int | None:
        """What is to be closed by whoever answers here from then on; None where somebody has done so."""
        return self._baton if self._attending.is_alive() else None

    def let_go(self) -> None:
        """From here on the baton is only in the hands of those who were given it."""
        if self._baton >= 0:
            os.close(self._baton)
            self._baton = -1

    def stop(self) -> None:
        self.let_go()
        self._attending.join(_CALLER_SECONDS)
        for opened in self._sockets:
            opened.close()

    def _attend(self) -> None:
        servers = [_Doorkeeper(opened) for opened in self._sockets]
        with selectors.DefaultSelector() as events:
            events.register(self._taken, selectors.EVENT_READ)
            for server in servers:
                events.register(server.fileno(), selectors.EVENT_READ, server)
            while True:
                asked = [key.data for key, _ in events.select()]
                if None in asked:
                    break
                for server in asked:
                    server.handle_request()
        os.close(self._taken)


class _Doorkeeper(ThreadingHTTPServer):
    daemon_threads = True
    # Who has been let in by the gateway meanwhile is not waited for.
    timeout = 0

    def __init__(self, opened: socket) -> None:
        super().__init__(opened.getsockname(), _NotYet, bind_and_activate=False)
        self.socket.close()
        opened.setblocking(False)
        self.socket = opened
        self._places = threading.BoundedSemaphore(_MOST_CALLERS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever goes away before he has his answer is no matter of ours."""


class _NotYet(BaseHTTPRequestHandler):
    timeout = _CALLER_SECONDS

    def _answer(self) -> None:
        # What is not read would be answered with a reset connection.
        length = self.headers.get("Content-Length", "")
        self.rfile.read(min(int(length), _LONGEST_BODY) if length.isdecimal() else 0)
        self.send_response(_STARTING.http_status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(_ANSWER))),
            ("Retry-After", "1"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_ANSWER)

    # The library's names.
    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

    def version_string(self) -> str:
        return "tritonlm"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the library's name)
        """The gateway's log begins with the gateway."""
