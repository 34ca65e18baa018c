"""Watches the running calls to one LM on one Triton, since Triton does not report a killed process to its callers.

Each check pings all processes of the LM, and asks the engine whether it still has the calls that have been silent for
long. Lost calls fail with `Broken`. This module knows neither connections nor how a call is resumed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from tritonlm.contract import Broken, TimedOut, TritonLMError, Unavailable

_CHECK_SECONDS = 1.0
# A ping that takes longer than this has failed; this many failures in a row mean that the process hangs.
_SLOW_SECONDS, _MAX_SLOW_CHECKS = 2.0, 2
# An engine that answers but makes no progress for this long hangs as well. The supervisor on its machine notices it
# sooner.
_STALLED_SECONDS = 15.0
_SILENT_SECONDS = 2.0
# A call that has not reached the engine yet may wait in the queue of `tokenize`.
_ARRIVAL_SECONDS = 10.0
_MAX_MISSED_CHECKS = 2
# An engine this much younger than a call is not the one that got the call.
_YOUNGER_SECONDS = 0.5


class WatchedCall:
    """A running call. `fail` ends its wait with an error."""

    def __init__(self, request_id: str, fail: Callable[[TritonLMError], None]) -> None:
        self.request_id, self.fail = request_id, fail
        self.sent = self.last_response = time.monotonic()
        # Whether the engine has received it.
        self.arrived = False
        self.missed_checks = 0

    def note_response(self) -> None:
        self.last_response, self.arrived, self.missed_checks = time.monotonic(), True, 0


class Watch:
    def __init__(
        self,
        model: str,
        ping: Callable[[], Awaitable[Mapping[str, Any]]],
        filter_known: Callable[[Sequence[str]], Awaitable[Collection[str]]],
    ) -> None:
        """`ping` calls all processes of the LM and returns the engine's status; `filter_known` returns those of the
        request ids that the engine has."""
        self._model, self._ping, self._filter_known = model, ping, filter_known
        self._calls: set[WatchedCall] = set()
        self._slow_checks = 0
        self._task: asyncio.Task[None] | None = None

    def add(self, call: WatchedCall) -> None:
        self._calls.add(call)
        if self._task is None or self._task.done():
            self._slow_checks = 0
            self._task = asyncio.get_running_loop().create_task(self._run())

    def remove(self, call: WatchedCall) -> None:
        self._calls.discard(call)

    @property
    def is_idle(self) -> bool:
        return not self._calls

    async def _run(self) -> None:
        while True:
            # After a slow check the next one follows at once.
            await asyncio.sleep(0 if self._slow_checks else _CHECK_SECONDS)
            if not self._calls:
                return
            try:
                await asyncio.wait_for(self._check(), _SLOW_SECONDS)
                self._slow_checks = 0
            except (TimedOut, TimeoutError, asyncio.TimeoutError):
                self._slow_checks += 1
                if self._slow_checks >= _MAX_SLOW_CHECKS:
                    self._slow_checks = 0
                    self._fail_all(f"{self._model!r} does not answer any more; it will be restarted")
            except Unavailable as error:
                self._fail_all(error.message)
            except TritonLMError:
                # A process that refuses the ping is alive.
                self._slow_checks = 0

    async def _check(self) -> None:
        report = await self._ping()
        age = report.get("age_seconds", float("inf"))
        if report.get("still_seconds", 0.0) >= _STALLED_SECONDS:
            self._fail_all(f"{self._model!r} makes no progress any more; it will be restarted")
            return
        now = time.monotonic()
        for call in list(self._calls):
            if now - call.sent > age + _YOUNGER_SECONDS:
                call.fail(Broken(f"the engine of {self._model!r} was replaced"))
        silent = [call for call in self._calls if now - call.last_response >= _SILENT_SECONDS]
        if not silent:
            return
        known = set(await self._filter_known([call.request_id for call in silent]))
        for call in silent:
            if call.request_id in known:
                call.arrived, call.missed_checks = True, 0
            elif call.arrived or now - call.last_response >= _ARRIVAL_SECONDS:
                call.missed_checks += 1
                if call.missed_checks >= _MAX_MISSED_CHECKS:
                    call.fail(Broken(f"{self._model!r} has lost this request"))

    def _fail_all(self, message: str) -> None:
        for call in list(self._calls):
            call.fail(Broken(message))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
