"""Several engines as one: a request goes to the one with the fewest, a command to all, and one report comes back.

One engine for each device, in one process: so a cancel finds its request wherever it runs, and what watches over the
process watches over all of them. It knows requests and reports, no device and no model.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tritonlm.contract.control import ABOUT, CANCEL, FIND, KNOWN, Command

from .engine import Engine
from .monitoring.metrics import added
from .monitoring.reports import COUNTERS
from .request import Request

Report = dict[str, Any]
Reply = Callable[[Report], None]

_ADDED = (
    *COUNTERS, "tokens_per_second", "running", "waiting", "progress", "places", "preemptions", "blocks", "blocks_used",
    "blocks_idle", "kv_cache_tokens", "full_context_slots",
)  # fmt: skip


class Engines(Protocol):
    """What one engine and several have in common."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, request: Request) -> None: ...

    def command(self, command: Command, reply: Reply) -> None: ...

    def measures(self) -> dict[str, float]: ...

    def take_timed(self) -> dict[str, list[float]]: ...


def together(engines: Sequence[Engine]) -> Engines:
    return engines[0] if len(engines) == 1 else Fleet(engines)


class Fleet:
    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        # Two requests that come at once must not both see the same engine empty.
        self._choosing = threading.Lock()

    def start(self) -> None:
        for engine in self._engines:
            engine.start()

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def submit(self, request: Request) -> None:
        with self._choosing:
            min(self._engines, key=lambda engine: engine.inside).submit(request)

    def measures(self) -> dict[str, float]:
        return added(engine.measures() for engine in self._engines)

    def take_timed(self) -> dict[str, list[float]]:
        taken = [engine.take_timed() for engine in self._engines]
        return {name: [seconds for each in taken for seconds in each[name]] for name in taken[0]}

    def command(self, command: Command, reply: Reply) -> None:
        """The report comes when the last engine has answered: one that hangs is not hidden by the others."""
        if command.name == ABOUT:
            self._engines[0].command(command, reply)
            return
        gathered = _Gathered(len(self._engines), lambda reports: reply(_merged(command, reports)))
        for place, engine in enumerate(self._engines):
            engine.command(command, gathered.taker(place))


class _Gathered:
    """Reports that come from several threads, handed on together."""

    def __init__(self, count: int, when_complete: Callable[[list[Report]], None]) -> None:
        self._reports: list[Report] = [{}] * count
        self._missing = count
        self._when_complete = when_complete
        self._lock = threading.Lock()

    def taker(self, place: int) -> Reply:
        def take(report: Report) -> None:
            with self._lock:
                self._reports[place] = report
                self._missing -= 1
                complete = not self._missing
            if complete:
                self._when_complete(self._reports)

        return take


def _merged(command: Command, reports: Sequence[Report]) -> Report:
    if command.name == CANCEL:
        return {"cancelled": sum(report["cancelled"] for report in reports)}
    if command.name == FIND:
        return {"requests": [request for report in reports for request in report["requests"]]}
    if command.name == KNOWN:
        return {"known": [request_id for report in reports for request_id in report["known"]]}
    return {
        **reports[0],
        **{name: sum(report[name] for report in reports) for name in _ADDED},
        **{name: any(report[name] for report in reports) for name in ("draining", "retired", "slow")},
        # One that stands still is not hidden by the others.
        **{name: max(report[name] for report in reports) for name in ("still_seconds", "step_running_seconds")},
        "idle_seconds": min(report["idle_seconds"] for report in reports),
        # The longest prompt must fit wherever it goes.
        "context_length": min(report["context_length"] for report in reports),
        "device": ",".join(report["device"] for report in reports),
        # On each device. An engine measures all that its process has there, engines of the same device included.
        "memory_bytes": max(report["memory_bytes"] for report in reports),
        **{name: _most_on_a_device(name, reports) for name in ("memory_reserved_bytes", "memory_claimed_bytes")},
    }


def _most_on_a_device(name: str, reports: Sequence[Report]) -> int:
    total: Counter[str] = Counter()
    for report in reports:
        total[report["device"]] += report[name]
    return max(total.values())
