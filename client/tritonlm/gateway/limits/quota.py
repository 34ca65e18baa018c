"""Quotas: each caller's limits on requests and tokens per minute and on concurrent requests, and its usage so far.

The rate windows come from the `limits` library, in this process's memory or in a Redis that several gateways share.
This module knows callers by name, not how they authenticate.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from limits.util import WindowStats

from tritonlm.access.keys import Limits
from tritonlm.client.types import CompletionUsage
from tritonlm.contract import RateLimited, Unavailable

from .. import metrics

_log = logging.getLogger("tritonlm.gateway")


@dataclass(frozen=True)
class Caller:
    name: str
    limits: Limits
    has_key: bool = True

    @property
    def label(self) -> str:
        """The name in metrics and usage reports. Callers without a key share an empty label."""
        return self.name if self.has_key else ""


@dataclass
class Usage:
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Quota:
    def __init__(self, storage_uri: str) -> None:
        """`storage_uri`: a URI of the limits library: memory://, or redis://HOST:PORT."""
        options = {} if storage_uri.startswith("memory") else {"implementation": "redispy"}
        storage = storage_from_string(f"async+{storage_uri}", wrap_exceptions=True, **options)
        self._requests, self._tokens = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)
        self.running: Counter[str] = Counter()
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self.since = int(time.time())

    async def acquire(self, caller: Caller) -> dict[str, str]:
        """Count a new request; returns the rate-limit headers, or raises RateLimited with the time to retry after."""
        headers: dict[str, str] = {}
        limit = caller.limits.running_requests
        if limit is not None and self.running[caller.name] >= limit:
            raise self._refusal(caller, f"{limit} requests at once are allowed", 1, headers)
        # Before the first wait for the storage, where the caller's next request would pass the check, too.
        self.running[caller.name] += 1
        try:
            with _storage_errors():
                await self._check_rates(caller, headers)
        except BaseException:
            self._leave(caller)
            raise
        return headers

    async def _check_rates(self, caller: Caller, headers: dict[str, str]) -> None:
        limits = caller.limits
        if limits.tokens_per_minute is not None:
            tokens = RateLimitItemPerMinute(limits.tokens_per_minute)
            window = await self._tokens.get_window_stats(tokens, "tokens", caller.name)
            seconds = _add_headers(headers, "tokens", tokens, window)
            if window.remaining <= 0:
                raise self._refusal(caller, f"{tokens.amount} tokens a minute are allowed", seconds, headers)
        if limits.requests_per_minute is not None:
            requests = RateLimitItemPerMinute(limits.requests_per_minute)
            allowed = await self._requests.hit(requests, "requests", caller.name)
            window = await self._requests.get_window_stats(requests, "requests", caller.name)
            seconds = _add_headers(headers, "requests", requests, window)
            if not allowed:
                raise self._refusal(caller, f"{requests.amount} requests a minute are allowed", seconds, headers)

    async def release(self, caller: Caller, usage: CompletionUsage | None, served: bool) -> None:
        """The request has ended with this usage, or was not admitted (`served` false)."""
        self._leave(caller)
        if not served:
            self._record_refusal(caller)
            return
        total = self.usage[caller.label]
        total.requests += 1
        metrics.record_key(caller.label, "served")
        if usage is None:
            return
        total.prompt_tokens += usage.prompt_tokens
        total.cached_tokens += usage.prompt_tokens_details.cached_tokens
        total.completion_tokens += usage.completion_tokens
        metrics.record_key_tokens(caller.label, usage)
        if caller.limits.tokens_per_minute is not None:
            window = RateLimitItemPerMinute(caller.limits.tokens_per_minute)
            cost = usage.prompt_tokens + usage.completion_tokens
            # The response is already sent; if the storage fails, the caller's next request is refused.
            with contextlib.suppress(Unavailable), _storage_errors():
                await self._tokens.hit(window, "tokens", caller.name, cost=cost)

    def _leave(self, caller: Caller) -> None:
        self.running[caller.name] -= 1
        if not self.running[caller.name]:
            del self.running[caller.name]

    def _record_refusal(self, caller: Caller) -> None:
        self.usage[caller.label].refused += 1
        metrics.record_key(caller.label, "refused")

    def _refusal(self, caller: Caller, reason: str, seconds: int, headers: dict[str, str]) -> RateLimited:
        self._record_refusal(caller)
        error = RateLimited(f"{reason}; retry after {seconds} s")
        error.retry_after, error.headers = seconds, headers
        return error


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """While the storage fails, requests with limits are refused."""
    try:
        yield
    except StorageError as error:
        _log.error("the storage of the rate limits failed: %s", error)
        raise Unavailable("the rate limits cannot be checked at the moment; try again later") from None


def _add_headers(headers: dict[str, str], name: str, limit: RateLimitItem, window: WindowStats) -> int:
    """Add the headers of one limit; returns the seconds until its window is reset."""
    seconds = max(1, math.ceil(window.reset_time - time.time()))
    headers[f"x-ratelimit-limit-{name}"] = str(limit.amount)
    headers[f"x-ratelimit-remaining-{name}"] = str(max(0, window.remaining))
    headers[f"x-ratelimit-reset-{name}"] = f"{seconds}s"
    return seconds
