"""Combines the engines of several devices: a request goes to the least loaded one, a command to all of them.

All engines are in one process. So a cancel reaches its request on any device, and the watchdog of the process watches
all of them. This module knows requests and reports, and neither devices nor models.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tritonlm.contract.control import ABOUT, CANCEL, FIND, KNOWN, Command

from .engine import Engine
from .monitoring.metrics import total
from .monitoring.reports import COUNTERS
from .request import Request

Report = dict[str, Any]
Reply = Callable[[Report], None]

_SUMMED = (
    *COUNTERS, "tokens_per_second", "running", "waiting", "progress", "slots", "places", "preemptions", "blocks",
    "blocks_used", "blocks_idle", "kv_cache_tokens", "full_context_slots",
)  # fmt: skip


class EngineInterface(Protocol):
    """The common interface of one engine and a fleet."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, request: Request) -> None: ...

    def command(self, command: Command, reply: Reply) -> None: ...

    def metric_values(self) -> dict[str, float]: ...

    def take_timed(self) -> dict[str, list[float]]: ...


def combine(engines: Sequence[Engine]) -> EngineInterface:
    return engines[0] if len(engines) == 1 else Fleet(engines)


class Fleet:
    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        # Two concurrent requests must not both choose the same idle engine.
        self._submit_lock = threading.Lock()

    def start(self) -> None:
        for engine in self._engines:
            engine.start()

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def submit(self, request: Request) -> None:
        with self._submit_lock:
            self._choose(request).submit(request)

    def _choose(self, request: Request) -> Engine:
        """The least loaded engine; while a suspect of killing processes is isolated, the first one if it has room.

        All engines die with their process. So a killer is found only where no other one computes beside it.
        """
        first = self._engines[0]
        if first.has_room and first.isolates(request):
            return first
        return min(self._engines, key=lambda engine: engine.in_flight)

    def metric_values(self) -> dict[str, float]:
        values = [engine.metric_values() for engine in self._engines]
        # Engines on the same device each report the whole process there.
        by_device = {
            engine.runner.device: own["memory_bytes"] for engine, own in zip(self._engines, values, strict=True)
        }
        return total(values) | {"memory_bytes": sum(by_device.values())}

    def take_timed(self) -> dict[str, list[float]]:
        timings = [engine.take_timed() for engine in self._engines]
        return {name: [seconds for timed in timings for seconds in timed[name]] for name in timings[0]}

    def command(self, command: Command, reply: Reply) -> None:
        """Reply when the last engine has replied, so that the others do not hide a hung one."""
        if command.name == ABOUT:
            self._engines[0].command(command, reply)
            return
        collector = _ReportCollector(len(self._engines), lambda reports: reply(_merge(command, reports)))
        for index, engine in enumerate(self._engines):
            engine.command(command, collector.receiver(index))


class _ReportCollector:
    """Collects one report from each engine, on any thread, and passes them on together."""

    def __init__(self, count: int, on_complete: Callable[[list[Report]], None]) -> None:
        self._reports: list[Report] = [{}] * count
        self._missing = count
        self._on_complete = on_complete
        self._lock = threading.Lock()

    def receiver(self, index: int) -> Reply:
        def receive(report: Report) -> None:
            with self._lock:
                self._reports[index] = report
                self._missing -= 1
                complete = not self._missing
            if complete:
                self._on_complete(self._reports)

        return receive


def _merge(command: Command, reports: Sequence[Report]) -> Report:
    if command.name == CANCEL:
        return {"cancelled": sum(report["cancelled"] for report in reports)}
    if command.name == FIND:
        return {"requests": [request for report in reports for request in report["requests"]]}
    if command.name == KNOWN:
        return {"known": [request_id for report in reports for request_id in report["known"]]}
    return {
        **reports[0],
        **{name: sum(report[name] for report in reports) for name in _SUMMED},
        **{name: any(report[name] for report in reports) for name in ("draining", "retired", "slow")},
        # The maximum, so that a hung engine is not hidden by the others.
        **{name: max(report[name] for report in reports) for name in ("still_seconds", "step_running_seconds")},
        "idle_seconds": min(report["idle_seconds"] for report in reports),
        # An adapter is loaded on each device that has requests for it.
        "adapters": [adapter for report in reports for adapter in report["adapters"]],
        # A prompt must fit into any engine.
        "context_length": min(report["context_length"] for report in reports),
        "device": ",".join(report["device"] for report in reports),
        # The most on one device. Engines on the same device each report the whole process there.
        "memory_bytes": max(report["memory_bytes"] for report in reports),
        **{name: _max_per_device(name, reports) for name in ("memory_reserved_bytes", "memory_claimed_bytes")},
    }


def _max_per_device(name: str, reports: Sequence[Report]) -> int:
    by_device: Counter[str] = Counter()
    for report in reports:
        by_device[report["device"]] += report[name]
    return max(by_device.values())
