"""Access control: checks the bearer key and its scope, the caller's quota, and the admission queue.

A plain ASGI middleware around all routes, so that no route is left out. The rules themselves are in `scopes`, `quota`
and `admission`. A request for a model enters the queue when its body is in, so that a silent caller holds no slot.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlm.access.keys import KeyRing, Limits
from tritonlm.contract import InsufficientScope, InvalidKey, TritonLMError

from .. import metrics
from ..batches.calls import INTERNAL_CALLER
from ..http.errors import http_response, response_of
from ..http.middleware import context_of
from ..settings import GatewaySettings
from .admission import AdmissionQueue
from .quota import Caller, Quota
from .scopes import is_inference, is_public, scope_of

_BYTES_PER_TOKEN = 4
_API_KEY = "x-api-key"


class AccessMiddleware:
    def __init__(
        self, app: ASGIApp, settings: GatewaySettings, ring: KeyRing, quota: Quota, admission: AdmissionQueue
    ) -> None:
        self._app, self._ring, self._quota, self._admission = app, ring, quota, admission
        # For callers without limits of their own.
        self._default_limits = Limits(requests_per_minute=settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser's CORS preflight (OPTIONS) carries no key.
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or _is_public(scope):
            await self._app(scope, receive, send)
            return
        try:
            # A batch's request has its owner beside it; HTTP cannot set this.
            caller = scope["state"].get(INTERNAL_CALLER) or self._identify(scope)
            context_of(scope).caller = caller.label
            if is_inference(scope["method"], scope["path"]):
                await self._run_inference(caller, scope, receive, send)
                return
        except TritonLMError as error:
            await response_of(error, scope["path"])(scope, receive, send)
            return
        except HTTPException as error:
            # Of the body: it is too large, or does not arrive.
            await http_response(error, scope["method"], scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope) -> Caller:
        headers = Headers(scope=scope)
        # Anthropic's libraries send the key in a header of its own.
        header = headers.get("authorization") or (f"Bearer {headers[_API_KEY]}" if _API_KEY in headers else "")
        scheme, _, secret = header.partition(" ")
        self._ring.reload()
        if self._ring.is_empty:
            # Without configured keys a key is not checked, so callers are told apart by address.
            return Caller(str((scope.get("client") or ("", 0))[0]), self._default_limits, has_key=False)
        key = self._ring.find(secret) if scheme.lower() == "bearer" else None
        if key is None or key.revoked is not None:
            reason = "no key was sent" if not header else "the key is wrong" if key is None else "the key is revoked"
            raise InvalidKey(f"{reason}; send it as Authorization: Bearer KEY, or as x-api-key")
        required = scope_of(scope["method"], scope["path"])
        if required not in key.scopes:
            raise InsufficientScope(
                f"this route needs a key with the scope {required}; {key.name} has {', '.join(key.scopes)}"
            )
        key_limits = key.limits.model_dump(exclude_none=True)
        return Caller(key.name, self._default_limits.model_copy(update=key_limits))

    async def _run_inference(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        headers, served = await self._quota.acquire(caller), False
        try:
            body = await self._read_body(caller, scope, receive)
            if body is None:
                context_of(scope).client_left = True
                return
            tokens, started = _tokens_of(len(body)), time.monotonic()
            await self._admission.enter(caller.name, caller.has_key, tokens)
            metrics.record_wait(time.monotonic() - started)
            served = True
            try:
                await self._app(scope, _with_body(receive, body), _with_headers(send, headers))
            finally:
                self._admission.leave(caller.name, tokens)
        finally:
            await self._quota.release(caller, context_of(scope).usage, served)

    async def _read_body(self, caller: Caller, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the caller disconnects before. The middleware around this one limits its size and its
        time."""
        body, is_whole = bytearray(), False
        with self._admission.arriving(caller.name, caller.has_key, _announced_tokens(scope)) as count:
            while not is_whole:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body += message.get("body", b"")
                count(_tokens_of(len(body)))
                is_whole = not message.get("more_body", False)
        return bytes(body)


def _is_public(scope: Scope) -> bool:
    return is_public(scope["path"], Headers(scope=scope).get("accept", ""))


def _tokens_of(length: int) -> int:
    """An estimate from the body's length, since the body has not been parsed yet."""
    return length // _BYTES_PER_TOKEN


def _announced_tokens(scope: Scope) -> int:
    """0 if the body is sent in chunks."""
    length = Headers(scope=scope).get("content-length", "")
    return _tokens_of(int(length)) if length.isdecimal() else 0


def _with_body(receive: Receive, body: bytes) -> Receive:
    """`receive` with the body that was read from it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_with_body() -> Message:
        return messages.pop() if messages else await receive()

    return receive_with_body


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return send_with_headers
