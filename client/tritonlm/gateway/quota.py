"""What each caller may still use: requests and tokens in a minute, and requests at once; and what it has used.

The windows are the `limits` library's, in this process's memory or in a Redis that several gateways share. It knows
callers by name, not how they showed who they are.
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

from . import metrics

_log = logging.getLogger("tritonlm.gateway")


@dataclass(frozen=True)
class Caller:
    name: str
    limits: Limits
    # Callers without a key are not told apart in metrics and usage.
    has_key: bool = True

    @property
    def shown(self) -> str:
        return self.name if self.has_key else ""


@dataclass
class Used:
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Allowance:
    def __init__(self, storage: str) -> None:
        """`storage`: a URI of the limits library: memory://, or redis://HOST:PORT."""
        options = {} if storage.startswith("memory") else {"implementation": "redispy"}
        kept = storage_from_string(f"async+{storage}", wrap_exceptions=True, **options)
        self._requests, self._tokens = MovingWindowRateLimiter(kept), FixedWindowRateLimiter(kept)
        self.running: Counter[str] = Counter()
        self.used: defaultdict[str, Used] = defaultdict(Used)
        self.since = int(time.time())

    async def take(self, caller: Caller) -> dict[str, str]:
        """Count a request in; headers that tell what is left, or RateLimited that says when there will be more."""
        headers: dict[str, str] = {}
        with _storage_errors():
            await self._check(caller, headers)
        self.running[caller.name] += 1
        return headers

    async def _check(self, caller: Caller, headers: dict[str, str]) -> None:
        limits = caller.limits
        if limits.running_requests is not None and self.running[caller.name] >= limits.running_requests:
            raise self._refusal(caller, f"{limits.running_requests} requests at once are allowed", 1, headers)
        if limits.tokens_per_minute is not None:
            tokens = RateLimitItemPerMinute(limits.tokens_per_minute)
            window = await self._tokens.get_window_stats(tokens, "tokens", caller.name)
            seconds = _told("tokens", tokens, window, headers)
            if window.remaining <= 0:
                raise self._refusal(caller, f"{tokens.amount} tokens a minute are allowed", seconds, headers)
        if limits.requests_per_minute is not None:
            requests = RateLimitItemPerMinute(limits.requests_per_minute)
            allowed = await self._requests.hit(requests, "requests", caller.name)
            window = await self._requests.get_window_stats(requests, "requests", caller.name)
            seconds = _told("requests", requests, window, headers)
            if not allowed:
                raise self._refusal(caller, f"{requests.amount} requests a minute are allowed", seconds, headers)

    async def give_back(self, caller: Caller, usage: CompletionUsage | None, served: bool) -> None:
        """Its request has ended, and used this much; or it was not let in."""
        self.running[caller.name] -= 1
        if not self.running[caller.name]:
            del self.running[caller.name]
        if not served:
            self._refused(caller)
            return
        used = self.used[caller.shown]
        used.requests += 1
        metrics.record_key(caller.shown, "served")
        if usage is None:
            return
        used.prompt_tokens += usage.prompt_tokens
        used.cached_tokens += usage.prompt_tokens_details.cached_tokens
        used.completion_tokens += usage.completion_tokens
        metrics.record_key_tokens(caller.shown, usage)
        if caller.limits.tokens_per_minute is not None:
            window = RateLimitItemPerMinute(caller.limits.tokens_per_minute)
            cost = usage.prompt_tokens + usage.completion_tokens
            # Its answer is out; the next request finds that nothing can be counted.
            with contextlib.suppress(Unavailable), _storage_errors():
                await self._tokens.hit(window, "tokens", caller.name, cost=cost)

    def _refused(self, caller: Caller) -> None:
        self.used[caller.shown].refused += 1
        metrics.record_key(caller.shown, "refused")

    def _refusal(self, caller: Caller, what: str, seconds: int, headers: dict[str, str]) -> RateLimited:
        self._refused(caller)
        error = RateLimited(f"{what}; retry after {seconds} s")
        error.retry_after, error.headers = seconds, headers
        return error


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Nobody is let past limits that cannot be counted."""
    try:
        yield
    except StorageError as error:
        _log.error("limits cannot be counted: %s", error)
        raise Unavailable("what callers may use cannot be counted at the moment; try again") from None


def _told(what: str, limit: RateLimitItem, window: WindowStats, headers: dict[str, str]) -> int:
    """Add the headers of one limit; in how many seconds there will be more."""
    seconds = max(1, math.ceil(window.reset_time - time.time()))
    headers[f"x-ratelimit-limit-{what}"] = str(limit.amount)
    headers[f"x-ratelimit-remaining-{what}"] = str(max(0, window.remaining))
    headers[f"x-ratelimit-reset-{what}"] = f"{seconds}s"
    return seconds
