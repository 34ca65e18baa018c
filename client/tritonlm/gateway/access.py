"""Who may call, and how often: a bearer key, and a number of requests a minute for each caller.

Plain ASGI around all routes, so that none can be forgotten. It knows no routes but the two that tell whether it lives.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlm.contract.errors import InvalidKey, RateLimited

from .errors import response_of
from .settings import GatewaySettings

# A supervisor has no key and must be able to look.
_OPEN = ("/health/live", "/health/ready")


class Access:
    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._key = _digest(settings.api_key.get_secret_value()) if settings.api_key else None
        self._limit = RateLimitItemPerMinute(settings.requests_per_minute) if settings.requests_per_minute else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser asks with OPTIONS, without a key, whether its page may ask at all.
        if scope["type"] != "http" or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "")
        kind, _, key = given.partition(" ")
        if self._key is not None and not (kind.lower() == "bearer" and hmac.compare_digest(_digest(key), self._key)):
            why = "no key was sent" if not given else "the key is wrong"
            await response_of(InvalidKey(f"{why}; send it as Authorization: Bearer KEY"))(scope, receive, send)
            return
        if self._limit is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        # A key that nobody checks is anybody's to change.
        caller = key if self._key is not None else str((scope.get("client") or ("", 0))[0])
        await self._bounded(self._limit, _digest(caller).hex(), scope, receive, send)

    async def _bounded(
        self, limit: RateLimitItemPerMinute, caller: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        allowed = self._limiter.hit(limit, caller)
        window = self._limiter.get_window_stats(limit, caller)
        seconds = max(1, math.ceil(window.reset_time - time.time()))
        headers = {
            "x-ratelimit-limit-requests": str(limit.amount),
            "x-ratelimit-remaining-requests": str(window.remaining),
            "x-ratelimit-reset-requests": f"{seconds}s",
        }

        async def marked_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        if allowed:
            await self._app(scope, receive, marked_send)
            return
        refusal = response_of(RateLimited(f"{limit.amount} requests a minute are allowed; retry after {seconds} s"))
        refusal.headers["Retry-After"] = str(seconds)
        await refusal(scope, receive, marked_send)


def _digest(key: str) -> bytes:
    # Of equal length, so that a comparison tells nothing of the key's.
    return hashlib.sha256(key.encode()).digest()
