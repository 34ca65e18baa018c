"""One request of a batch, sent through the gateway's own application: its checks, metrics, logs and quota apply.

The caller's identity is passed beside the request, where no HTTP client can put it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from ..http.errors import body_of
from ..limits.quota import Caller

# In the state of the ASGI scope.
INTERNAL_CALLER = "internal_caller"


@dataclass(frozen=True)
class Answer:
    status: int
    retry_after: float
    body: Any


async def send(app: ASGIApp, path: str, body: dict[str, Any], caller: Caller, request_id: str) -> Answer:
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), "x-request-id": request_id}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("batch", 0), "server": ("batch", 0), "state": {INTERNAL_CALLER: caller},
    }  # fmt: skip
    messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    parts: list[bytes] = []
    start: dict[str, Any] = {}
    is_whole = False

    async def receive() -> Message:
        if not messages:
            # Nobody disconnects.
            await asyncio.Event().wait()
        return messages.pop()

    async def collect(message: Message) -> None:
        nonlocal is_whole
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))
            is_whole = not message.get("more_body", False)

    try:
        await app(scope, receive, collect)
    except Exception as error:
        # Starlette sends the 500 and raises the error again, for an HTTP server's log.
        if not is_whole:
            return Answer(500, 1.0, body_of(error))
    sent = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
    retry_after = sent.get("retry-after", "")
    return Answer(start["status"], float(retry_after) if retry_after.isdecimal() else 1.0, json.loads(b"".join(parts)))
