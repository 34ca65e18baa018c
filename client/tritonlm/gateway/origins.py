"""Which web pages may call: pages of the gateway itself and of the allowed origins. It sends the CORS headers.

A browser sends some requests of any page without asking first: those without a body, with a form, or with text. Their
pages cannot read the response, but the request would have its effect.
"""

from __future__ import annotations

from collections.abc import Collection

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import cross_site_response
from .middleware import REQUEST_IDS
from .responses import IGNORED_HEADER

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# What a browser says about a page, which cannot change it: of the same origin, or no page (an extension, the user).
_SITE, _NOT_CROSS_SITE = "sec-fetch-site", ("same-origin", "none")
_RATE_LIMITS = [f"x-ratelimit-{kind}-{of}" for kind in ("limit", "remaining", "reset") for of in ("requests", "tokens")]


def install(app: FastAPI, allowed: Collection[str]) -> None:
    app.add_middleware(OriginMiddleware, allowed=allowed)
    if allowed:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed,
            allow_methods=["GET", "POST", "DELETE"],
            # SDKs send headers of their own, such as X-Stainless-OS.
            allow_headers=["*"],
            expose_headers=[*REQUEST_IDS, IGNORED_HEADER, "Retry-After", "x-should-retry", *_RATE_LIMITS],
        )


class OriginMiddleware:
    """Refuses requests with an effect that come from a page of another origin. Only browsers send an origin."""

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._may_call(origin, headers):
                await cross_site_response(scope["path"], origin)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _may_call(self, origin: str, headers: Headers) -> bool:
        if "*" in self._allowed or origin in self._allowed or headers.get(_SITE) in _NOT_CROSS_SITE:
            return True
        # The origin of a sandboxed page is "null": it has no host.
        host = origin.partition("://")[2]
        return bool(host) and host.lower() == headers.get("host", "").lower()
