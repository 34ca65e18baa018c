"""Who may call: a bearer key with the scope that the route wants; how much; and how many at once.

Plain ASGI around all routes, so that none can be forgotten. It brings keys, allowance and admission together; their
rules are their own.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlm.access.keys import KeyRing, Limits
from tritonlm.contract import InsufficientScope, InvalidKey, TritonLMError

from . import metrics
from .admission import Admission
from .errors import response_of
from .middleware import context_of
from .quota import Allowance, Caller
from .scopes import is_open, is_work, scope_of
from .settings import GatewaySettings

_BYTES_A_TOKEN = 4


class Access:
    def __init__(
        self, app: ASGIApp, settings: GatewaySettings, ring: KeyRing, allowance: Allowance, admission: Admission
    ) -> None:
        self._app, self._ring, self._allowance, self._admission = app, ring, allowance, admission
        # Of callers without a limit of their own.
        self._limits = Limits(requests_per_minute=settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser asks with OPTIONS, without a key, whether its page may ask at all.
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._identify(scope)
            context_of(scope).caller = caller.shown
            if is_work(scope["method"], scope["path"]):
                await self._work(caller, scope, receive, send)
                return
        except TritonLMError as error:
            await response_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope) -> Caller:
        given = Headers(scope=scope).get("authorization", "")
        kind, _, secret = given.partition(" ")
        self._ring.look()
        if self._ring.is_empty:
            # A key that nobody checks is anybody's to change.
            return Caller(str((scope.get("client") or ("", 0))[0]), self._limits, has_key=False)
        key = self._ring.find(secret) if kind.lower() == "bearer" else None
        if key is None or key.revoked is not None:
            why = "no key was sent" if not given else "the key is wrong" if key is None else "the key has been revoked"
            raise InvalidKey(f"{why}; send it as Authorization: Bearer KEY")
        wanted = scope_of(scope["method"], scope["path"])
        if wanted not in key.scopes:
            raise InsufficientScope(f"this needs a key with the scope {wanted}; {key.name} has {', '.join(key.scopes)}")
        given_limits = key.limits.model_dump(exclude_none=True)
        return Caller(key.name, self._limits.model_copy(update=given_limits))

    async def _work(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        headers, served, tokens = await self._allowance.take(caller), False, _tokens_in(scope)
        began = time.monotonic()
        try:
            await self._admission.enter(caller.name, caller.has_key, tokens)
            metrics.record_wait(time.monotonic() - began)
            served = True
            try:
                await self._app(scope, receive, _marked(send, headers))
            finally:
                self._admission.leave(caller.name, tokens)
        finally:
            await self._allowance.give_back(caller, context_of(scope).usage, served)


def _is_open(scope: Scope) -> bool:
    return is_open(scope["path"], Headers(scope=scope).get("accept", ""))


def _tokens_in(scope: Scope) -> int:
    """About as many as the body can hold; before it is read nothing else is known of it."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length) // _BYTES_A_TOKEN if length.isdecimal() else 0


def _marked(send: Send, headers: dict[str, str]) -> Send:
    async def marked_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return marked_send
