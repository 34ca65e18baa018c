"""The placeholder listener: holds the gateway's port and replies 503 until the gateway itself listens there.

The supervisor owns the sockets and passes them to every gateway process. When a gateway dies, new connections wait in
the socket's backlog for the next one. The listener does not know what a gateway is or when it starts.
"""

from __future__ import annotations

import json
import os
import selectors
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from types import TracebackType
from typing import Any

from tritonlm.contract.errors import Unavailable

from .ports import listen

_MAX_CONNECTIONS = 64
_CONNECTION_SECONDS = 2.0
_MAX_BODY_BYTES = 2**20
_STARTING = Unavailable("tritonlm is starting; its language models are not loaded yet")
_RESPONSE_BODY = json.dumps(
    {"error": {"message": _STARTING.message, "type": _STARTING.openai_type, "param": None, "code": _STARTING.code}}
).encode()


class PlaceholderListener:
    """A context manager: the port is open inside it. On exit this process closes its copies of the sockets."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: with what the gateway will encrypt, if it does."""
        self._tls = tls
        self._sockets = listen(host, port, "the gateway", "port")
        # A pipe: the gateway closes the write end when it listens, or the kernel does when the gateway dies.
        self._ready_read, self._ready_write = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="placeholder", daemon=True)
        self._thread.start()

    def __enter__(self) -> PlaceholderListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def socket_fds(self) -> list[int]:
        return [sock.fileno() for sock in self._sockets]

    @property
    def ready_fd(self) -> int | None:
        """The descriptor that the gateway closes when it listens; None when a gateway has already done so."""
        return self._ready_write if self._thread.is_alive() else None

    def release(self) -> None:
        """Close this process's copy of the ready descriptor; only the processes that inherited it hold it then."""
        if self._ready_write >= 0:
            os.close(self._ready_write)
            self._ready_write = -1

    def stop(self) -> None:
        self.release()
        self._thread.join(_CONNECTION_SECONDS)
        for sock in self._sockets:
            sock.close()

    def _serve(self) -> None:
        servers = [_PlaceholderServer(sock, self._tls) for sock in self._sockets]
        with selectors.DefaultSelector() as selector:
            selector.register(self._ready_read, selectors.EVENT_READ)
            for server in servers:
                selector.register(server.fileno(), selectors.EVENT_READ, server)
            while True:
                ready = [key.data for key, _ in selector.select()]
                if None in ready:
                    break
                for server in ready:
                    server.handle_request()
        os.close(self._ready_read)


class _PlaceholderServer(ThreadingHTTPServer):
    daemon_threads = True
    # Do not block when the gateway has accepted the connection in the meantime.
    timeout = 0

    def __init__(self, sock: socket, tls: ssl.SSLContext | None) -> None:
        super().__init__(sock.getsockname(), _UnavailableHandler, bind_and_activate=False)
        self.socket.close()
        sock.setblocking(False)
        self.socket, self._tls = sock, tls
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        # In the connection's own thread: a client that sends nothing holds up no other one.
        request.settimeout(_CONNECTION_SECONDS)
        with self._tls.wrap_socket(request, server_side=True) as encrypted:
            super().finish_request(encrypted, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect before they have the response."""


class _UnavailableHandler(BaseHTTPRequestHandler):
    timeout = _CONNECTION_SECONDS

    def _respond(self) -> None:
        # Read the body: closing a connection with unread data resets it, and the client loses the response.
        length = self.headers.get("Content-Length", "")
        self.rfile.read(min(int(length), _MAX_BODY_BYTES) if length.isdecimal() else 0)
        self.send_response(_STARTING.http_status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(_RESPONSE_BODY))),
            ("Retry-After", "1"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_RESPONSE_BODY)

    # The method names are http.server's.
    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _respond  # noqa: N815

    def version_string(self) -> str:
        return "tritonlm"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        """Log nothing: the gateway writes the request log."""
