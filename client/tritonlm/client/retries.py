"""Attempts on a client's Tritons: which one comes next, when one has failed, and how long to wait in between.

It repeats calls with one response itself. `resume` holds the state of a sequence's attempts, `load_balancer` that of
the Tritons.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tritonlm.client.load_balancer import LoadBalancer
from tritonlm.client.resume import Attempts
from tritonlm.client.transport import Call, Transport
from tritonlm.contract import Draining, NotLoaded, TritonLMError, Unavailable
from tritonlm.contract.backoff import doubled

T = TypeVar("T")
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.1, 2.0
# The timeout of the health check of a Triton that has failed.
_LIVENESS_SECONDS = 1.0


class Retries:
    def __init__(self, transports: Sequence[Transport], max_retries: int, repair_seconds: float) -> None:
        self._transports = transports
        self._max_retries, self._repair_seconds = max_retries, repair_seconds
        self.balancer = LoadBalancer(transports)

    def attempts(self, call: Call) -> Attempts:
        return Attempts(call, self._max_retries, self._repair_seconds)

    async def repeat(self, call: Call, query: Callable[[Transport, Call], Awaitable[T]]) -> T:
        """The result of a call that has one response. After a fault it is made again."""
        attempts = self.attempts(call)
        transport: Transport | None = None
        while True:
            transport = await self.healthy_transport(call, transport)
            try:
                result = await query(transport, attempts.next_call())
            except TritonLMError as error:
                pause = self.pause_after(error, transport, attempts)
            else:
                self.balancer.mark_healthy(transport)
                return result
            await asyncio.sleep(pause)

    async def on_any(self, query: Callable[[Transport], Awaitable[T]]) -> T:
        """Run a short query on the first Triton that answers it."""
        transport: Transport | None = None
        for attempt in itertools.count():
            transport = self.balancer.pick(failed=transport)
            try:
                return await query(transport)
            except Unavailable as error:
                # A Triton that has not loaded this model is healthy.
                if not isinstance(error, NotLoaded):
                    self.balancer.mark_failed(transport)
                if attempt >= self._max_retries:
                    raise
            await asyncio.sleep(doubled(_FIRST_PAUSE_SECONDS, attempt, _MAX_PAUSE_SECONDS))
        raise AssertionError("unreachable")

    def pause_after(self, error: TritonLMError, transport: Transport, attempts: Attempts) -> float:
        """How long to wait before the next attempt; raises the error if there is none."""
        responded_recently = self.balancer.responded_recently()
        if isinstance(error, (Unavailable, Draining)):
            self.balancer.mark_failed(transport)
        return attempts.pause_after(error, responded_recently)

    async def healthy_transport(self, call: Call, failed: Transport | None) -> Transport:
        """The Triton for the next attempt. One that failed before must pass a liveness check, if another is left."""
        for _ in self._transports:
            transport = self.balancer.pick(call, failed)
            if not self.balancer.is_failing(transport):
                break
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                if await asyncio.wait_for(transport.is_live(), _LIVENESS_SECONDS):
                    break
            self.balancer.mark_failed(transport)
        return transport
