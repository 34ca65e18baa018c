"""How many requests are inside at once, and whose turn it is.

Beyond the bound the next one is refused before any work, and told when to come back. Of those inside, so many are
handed on; the others wait here, and places that become free go to the caller who has the fewest: one cannot keep the
others out. It counts; it does not know what requests are.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque

from tritonlm.contract import Draining, QueueFull, QueueTimeout

# Over how long the rate at which requests end is measured.
_RATE_SECONDS = 10.0
_LONGEST_RETRY_SECONDS = 60
# What one caller may have of all that may be inside: the rest is for who comes next.
_MOST_OF_ALL = 0.8


class Admission:
    def __init__(self, limit: int, places: int, patience: float, tokens: int = 2**31) -> None:
        """At most `limit` are inside, with so many tokens in their prompts, and `places` of them run; who waits longer
        than `patience` seconds is sent away."""
        self.limit, self._places, self._patience = limit, places, patience
        self._most_tokens, self.tokens = tokens, 0
        self.closed = False
        self.running: Counter[str] = Counter()
        # By caller, in the order in which they are asked when all have as few.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._ended: deque[float] = deque(maxlen=10_000)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def total(self) -> int:
        return self.running.total() + self.waiting

    def close(self) -> None:
        """From now on nobody comes in; who waits inside still gets a turn."""
        self.closed = True

    async def enter(self, caller: str, is_known: bool = True, tokens: int = 0) -> None:
        """Wait for a turn. Callers who are not known, but by an address, may be many behind one."""
        self._check(caller, is_known, tokens)
        self.tokens += tokens
        try:
            await self._wait_for_turn(caller)
        except BaseException:
            self.tokens -= tokens
            raise

    async def _wait_for_turn(self, caller: str) -> None:
        if not self._waiting and self.running.total() < self._places:
            self.running[caller] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await asyncio.wait_for(asyncio.shield(turn), self._patience)
        except (TimeoutError, asyncio.TimeoutError):
            self._give_up(caller, turn)
            seconds = self.retry_after()
            error = QueueTimeout(f"no place was free in {self._patience:g} s; retry after {seconds} s")
            error.retry_after = seconds
            raise error from None
        except asyncio.CancelledError:
            self._give_up(caller, turn)
            raise

    def leave(self, caller: str, tokens: int = 0) -> None:
        self.tokens -= tokens
        self.running[caller] -= 1
        if not self.running[caller]:
            del self.running[caller]
        self._ended.append(time.monotonic())
        self._give_turns()

    def retry_after(self) -> int:
        """In about how many seconds there will be room, at the rate at which requests have ended lately."""
        now = time.monotonic()
        ended = sum(now - moment <= _RATE_SECONDS for moment in self._ended)
        if not ended:
            return 1
        return min(_LONGEST_RETRY_SECONDS, max(1, math.ceil((self.total - self.limit + 1) * _RATE_SECONDS / ended)))

    def _check(self, caller: str, is_known: bool, tokens: int) -> None:
        if self.closed:
            raise Draining("this server is being stopped; send the request elsewhere or later")
        total = self.total
        mine = self.running[caller] + len(self._waiting.get(caller, ()))
        if total >= self.limit:
            why = f"{total} requests run or wait already"
        elif total and self.tokens + tokens > self._most_tokens:
            why = f"{self.tokens} tokens of prompts are inside already"
        elif is_known and mine >= max(1, self.limit * _MOST_OF_ALL):
            why = f"{mine} requests of yours run or wait already"
        else:
            return
        seconds = self.retry_after()
        error = QueueFull(f"{why}; retry after {seconds} s")
        error.retry_after = seconds
        raise error

    def _give_turns(self) -> None:
        while self._waiting and self.running.total() < self._places:
            caller = min(self._waiting, key=lambda name: self.running[name])
            line = self._waiting.pop(caller)
            turn = line.popleft()
            if line:
                # Behind the others, for the next time that all have as few.
                self._waiting[caller] = line
            self.running[caller] += 1
            turn.set_result(None)

    def _give_up(self, caller: str, turn: asyncio.Future[None]) -> None:
        if turn.done():
            # The turn came at the same moment.
            self.leave(caller)
            return
        line = self._waiting[caller]
        line.remove(turn)
        if not line:
            del self._waiting[caller]
