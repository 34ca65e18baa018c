"""Looks after the calls to one LM on one Triton while there are any: a killed process is told to nobody by Triton.

Each look asks all the LM's processes for a sign of life, and the engine whether it still knows the calls that have long
said nothing. Calls that are lost fail with `Broken`. It knows neither connections nor how a call goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from tritonlm.contract import Broken, TimedOut, TritonLMError, Unavailable

_LOOK_SECONDS = 1.0
# A slow sign of life is none; so many in a row mean that the process hangs. So does an engine that answers, and whose
# work has made no progress for so long: on its own machine the server knows better and sooner.
_SLOW_SECONDS, _SLOW_LOOKS = 2.0, 2
_STILL_SECONDS = 15.0
_SILENT_SECONDS = 2.0
# A call that has not come to the engine yet may wait in front of `tokenize`.
_UNSEEN_SECONDS = 10.0
_MISSED_LOOKS = 2
# An engine so much younger than a call is not the one that the call was sent to.
_YOUNGER_SECONDS = 0.5


class Watched:
    """A call under way. `fail` ends its waiting with an error."""

    def __init__(self, request_id: str, fail: Callable[[TritonLMError], None]) -> None:
        self.request_id, self.fail = request_id, fail
        self.sent = self.heard = time.monotonic()
        # The engine has had it.
        self.arrived = False
        self.missed = 0

    def hear(self) -> None:
        self.heard, self.arrived, self.missed = time.monotonic(), True, 0


class Watch:
    def __init__(
        self,
        model: str,
        ask: Callable[[], Awaitable[Mapping[str, Any]]],
        known: Callable[[Sequence[str]], Awaitable[Collection[str]]],
    ) -> None:
        """`ask` has all processes of the LM answer, and tells its engine's status; `known` tells which of these calls
        the engine has."""
        self._model, self._ask, self._known = model, ask, known
        self._calls: set[Watched] = set()
        self._slow_looks = 0
        self._task: asyncio.Task[None] | None = None

    def enter(self, call: Watched) -> None:
        self._calls.add(call)
        if self._task is None or self._task.done():
            self._slow_looks = 0
            self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self, call: Watched) -> None:
        self._calls.discard(call)

    @property
    def is_idle(self) -> bool:
        return not self._calls

    async def _run(self) -> None:
        while True:
            # Who was slow is asked again at once.
            await asyncio.sleep(0 if self._slow_looks else _LOOK_SECONDS)
            if not self._calls:
                return
            try:
                await asyncio.wait_for(self._look(), _SLOW_SECONDS)
                self._slow_looks = 0
            except (TimedOut, TimeoutError, asyncio.TimeoutError):
                self._slow_looks += 1
                if self._slow_looks >= _SLOW_LOOKS:
                    self._slow_looks = 0
                    self._break(f"{self._model!r} does not answer any more; it will be brought back")
            except Unavailable as error:
                self._break(error.message)
            except TritonLMError:
                # Whoever refuses a question is alive.
                self._slow_looks = 0

    async def _look(self) -> None:
        report = await self._ask()
        age = report.get("age_seconds", float("inf"))
        if report.get("still_seconds", 0.0) >= _STILL_SECONDS:
            self._break(f"{self._model!r} makes no progress any more; it will be brought back")
            return
        now = time.monotonic()
        for call in list(self._calls):
            if now - call.sent > age + _YOUNGER_SECONDS:
                call.fail(Broken(f"the engine of {self._model!r} was replaced"))
        silent = [call for call in self._calls if now - call.heard >= _SILENT_SECONDS]
        if not silent:
            return
        known = set(await self._known([call.request_id for call in silent]))
        for call in silent:
            if call.request_id in known:
                call.arrived, call.missed = True, 0
            elif call.arrived or now - call.heard >= _UNSEEN_SECONDS:
                call.missed += 1
                if call.missed >= _MISSED_LOOKS:
                    call.fail(Broken(f"{self._model!r} has lost this request"))

    def _break(self, why: str) -> None:
        for call in list(self._calls):
            call.fail(Broken(why))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
