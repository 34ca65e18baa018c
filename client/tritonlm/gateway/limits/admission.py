"""The admission queue: limits the number of requests in the gateway, and orders those that wait.

A request above the limits is refused at once with a time to retry after. Of the admitted requests, a fixed number runs;
the others wait, and a free slot goes to the caller with the fewest running requests. The queue only counts; it does not
know what requests are.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from tritonlm.contract import Draining, QueueFull, QueueTimeout

# The time window of the rate at which requests end.
_RATE_SECONDS = 10.0
_MAX_RETRY_SECONDS = 60
# The fraction of the limit that one caller may occupy, so that others can still get in.
_MAX_CALLER_SHARE = 0.8


class AdmissionQueue:
    def __init__(self, max_requests: int, max_running: int, queue_seconds: float, max_tokens: int = 2**31) -> None:
        """At most `max_requests` requests, with together `max_tokens` prompt tokens, are admitted, and `max_running`
        of them run. A request that waits longer than `queue_seconds` is refused."""
        self.max_requests, self._max_running, self._queue_seconds = max_requests, max_running, queue_seconds
        self._max_tokens, self.tokens = max_tokens, 0
        self.closed = False
        self.running: Counter[str] = Counter()
        # The waiting requests by caller. Callers with equally many running requests are served in this order.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._end_times: deque[float] = deque(maxlen=10_000)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def total(self) -> int:
        return self.running.total() + self.waiting

    def close(self) -> None:
        """Refuse new requests; those that wait still run."""
        self.closed = True

    @contextlib.contextmanager
    def arriving(self, caller: str, is_known: bool = True, tokens: int = 0) -> Iterator[Callable[[int], None]]:
        """While a request's body arrives. Yields a function that takes the prompt tokens so far.

        Only those that have arrived are counted, and not the request itself: a caller that sends no body keeps nobody
        out. `tokens` are those that the caller announces; too many are refused at once.
        """
        counted = 0

        def count(arrived: int) -> None:
            nonlocal counted
            self.tokens -= counted
            counted = 0
            self._check(caller, is_known, arrived)
            self.tokens += arrived
            counted = arrived

        self._check(caller, is_known, tokens)
        try:
            yield count
        finally:
            self.tokens -= counted

    async def enter(self, caller: str, is_known: bool = True, tokens: int = 0) -> None:
        """Wait for a slot. A caller that is known by its address only may stand for many, so it has no share limit."""
        self._check(caller, is_known, tokens)
        self.tokens += tokens
        try:
            await self._wait_for_slot(caller)
        except BaseException:
            self.tokens -= tokens
            raise

    async def _wait_for_slot(self, caller: str) -> None:
        if not self._waiting and self.running.total() < self._max_running:
            self.running[caller] += 1
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(slot)
        try:
            await asyncio.wait_for(asyncio.shield(slot), self._queue_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            self._stop_waiting(caller, slot)
            seconds = self.retry_after()
            error = QueueTimeout(f"no slot was free in {self._queue_seconds:g} s; retry after {seconds} s")
            error.retry_after = seconds
            raise error from None
        except asyncio.CancelledError:
            self._stop_waiting(caller, slot)
            raise

    def leave(self, caller: str, tokens: int = 0) -> None:
        self.tokens -= tokens
        self.running[caller] -= 1
        if not self.running[caller]:
            del self.running[caller]
        self._end_times.append(time.monotonic())
        self._start_waiting()

    def retry_after(self) -> int:
        """Seconds until a request will probably be admitted, from the rate at which requests ended recently."""
        now = time.monotonic()
        ended = sum(now - moment <= _RATE_SECONDS for moment in self._end_times)
        if not ended:
            return 1
        excess = self.total - self.max_requests + 1
        return min(_MAX_RETRY_SECONDS, max(1, math.ceil(excess * _RATE_SECONDS / ended)))

    def _check(self, caller: str, is_known: bool, tokens: int) -> None:
        if self.closed:
            raise Draining("this server is stopping; send the request elsewhere or later")
        total = self.total
        caller_total = self.running[caller] + len(self._waiting.get(caller, ()))
        if total >= self.max_requests:
            reason = f"{total} requests already run or wait"
        elif (total or self.tokens) and self.tokens + tokens > self._max_tokens:
            reason = f"requests with {self.tokens} prompt tokens already run, wait or arrive"
        elif is_known and caller_total >= max(1, self.max_requests * _MAX_CALLER_SHARE):
            reason = f"{caller_total} of your requests already run or wait"
        else:
            return
        seconds = self.retry_after()
        error = QueueFull(f"{reason}; retry after {seconds} s")
        error.retry_after = seconds
        raise error

    def _start_waiting(self) -> None:
        while self._waiting and self.running.total() < self._max_running:
            caller = min(self._waiting, key=lambda name: self.running[name])
            slots = self._waiting.pop(caller)
            slot = slots.popleft()
            if slots:
                # Inserted at the end, behind callers with equally many running requests.
                self._waiting[caller] = slots
            self.running[caller] += 1
            slot.set_result(None)

    def _stop_waiting(self, caller: str, slot: asyncio.Future[None]) -> None:
        if slot.done():
            # The slot was assigned at the same moment.
            self.leave(caller)
            return
        slots = self._waiting[caller]
        slots.remove(slot)
        if not slots:
            del self._waiting[caller]
