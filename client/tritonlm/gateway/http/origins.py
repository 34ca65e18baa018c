"""Which web pages may call: pages of the gateway itself and of the allowed origins. It sends the CORS headers.

A browser sends some requests of any page without asking first: those without a body, with a form, or with text. Their
pages cannot read the response, but the request would have its effect. A page whose host's name resolves to this machine
(DNS rebinding) is of the gateway's own origin for the browser: only the name in Host tells it apart.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tritonlm.access.exposure import is_loopback
from tritonlm.access.keys import KeyRing

from ..settings import GatewaySettings
from .errors import cross_site_response, wrong_host_response
from .middleware import IGNORED_HEADER, REQUEST_IDS

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# What a browser says about a page, which cannot change it: of the same origin, or no page (an extension, the user).
_SITE, _NOT_CROSS_SITE = "sec-fetch-site", ("same-origin", "none")
_RATE_LIMITS = [f"x-ratelimit-{kind}-{of}" for kind in ("limit", "remaining", "reset") for of in ("requests", "tokens")]


def install(app: FastAPI, settings: GatewaySettings, ring: KeyRing) -> None:
    allowed = settings.cors_allow_origins
    # Beyond this machine either a key is required or everybody may call.
    if is_loopback(settings.host) and "*" not in allowed:
        own = {settings.host.lower(), *(_host_name(origin.partition("://")[2]) for origin in allowed)}
        app.add_middleware(HostMiddleware, ring=ring, own=own - {""})
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


class HostMiddleware:
    """While there is no key, refuses requests for a host that is not an address, localhost or one of `own`."""

    def __init__(self, app: ASGIApp, ring: KeyRing, own: Collection[str]) -> None:
        self._app, self._ring, self._own = app, ring, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # No browser leaves it out; the requests of a batch have none.
            host = Headers(scope=scope).get("host", "")
            if host and not self._is_own(_host_name(host)):
                self._ring.reload()
                if self._ring.is_empty:
                    await wrong_host_response(scope["path"], host)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_own(self, name: str) -> bool:
        return name in self._own or name == "localhost" or name.endswith(".localhost") or _is_address(name)


def _host_name(host: str) -> str:
    """The host without its port, in lower case; empty if it is not valid."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """Whether it is an IP address. No name server says where that is, so a page of this host comes from there."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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
