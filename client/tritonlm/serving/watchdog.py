"""Monitors the processes of Triton's models and has Triton restart those that have died or hang.

Triton does neither: it never restarts a killed model process, and keeps the model "ready". A model is dead when its
process is gone. It hangs when it makes no progress: it does not reply, or its engine's step counter does not advance,
and its threads use no processor time. A model that makes progress is slow and is not restarted. `check` runs on the
caller's thread. The watchdog knows the processes of one Triton; the supervisor restarts Triton itself.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from . import terminal
from .backoff import RestartBackoff
from .child import is_alive
from .control import TritonControl
from .errors import ServingError
from .restart_counts import RestartCounts

_PING_INTERVAL_SECONDS = 1.0
# A ping is answered at once, however long a step takes. A ping fails when the reply takes longer, or when the engine
# has made no progress for _STALLED_SECONDS.
_REPLY_SECONDS, _STALLED_SECONDS = 1.0, 3.0
# A process hangs after this many failed pings in a row over at least this time. A stopped process (SIGSTOP) counts as
# hung at the first failed ping.
_HANG_PINGS, _HANG_SECONDS = 3, 3.5
# A process whose threads compute or wait for a disk is slow, not hung, for up to this time (it might spin forever).
_SLOW_SECONDS = 60.0
# A process computes when it has used at least this share of a core since the last ping.
_BUSY_CORE_SHARE = 0.05
_MAX_FAILED_CHECKS = 3
_STUB = "triton_python_backend_stub"


@dataclass
class _PartState:
    # Failed pings in a row, the time of the last good one, and whether "slow" has been logged since then.
    failed_pings: int = 0
    last_healthy: float = field(default_factory=time.monotonic)
    slow_logged: bool = False
    # Processor seconds that the process had used at the time `cpu_measured_at`.
    cpu_seconds: float = 0.0
    cpu_measured_at: float = 0.0
    backoff: RestartBackoff = field(default_factory=RestartBackoff)


class Watchdog:
    def __init__(self, control: TritonControl, load_seconds: float, restart_counts: RestartCounts) -> None:
        self._control, self._load_seconds, self._restart_counts = control, load_seconds, restart_counts
        self._parts: dict[str, _PartState] = {}
        self._processes: dict[str, psutil.Process] = {}
        self._next_pings = 0.0
        # Parts that are being restarted, with the time of the restart.
        self._restarting: dict[str, float] = {}
        # Checks in a row at which Triton itself did not reply.
        self._failed_checks = 0

    @property
    def triton_hangs(self) -> bool:
        """Whether Triton itself has not replied to several checks in a row."""
        return self._failed_checks >= _MAX_FAILED_CHECKS

    def reset(self) -> None:
        """Discard the state of all processes after a restart of Triton."""
        self._processes.clear()
        self._restarting.clear()
        self._failed_checks = 0
        for part in self._parts.values():
            part.failed_pings, part.last_healthy = 0, time.monotonic()

    def check(self, triton: int) -> None:
        """Restart parts that have died since the last check; ping all parts every _PING_INTERVAL_SECONDS."""
        ping = time.monotonic() >= self._next_pings
        if not ping and not self._restarting and all(map(is_alive, self._processes.values())):
            return
        try:
            loaded = self._control.loaded_parts()
            self._failed_checks = 0
        except (ServingError, httpx.HTTPError):
            # A stopped Triton counts as hung at once: further checks cannot succeed.
            self._failed_checks += _MAX_FAILED_CHECKS if _is_stopped(triton) else 1
            return
        if not self._knows(loaded):
            self._processes = _processes_of(triton)
        self._update_restarting(loaded)
        for name in loaded:
            if name not in self._processes:
                self._restart(name, "has died")
            elif ping:
                self._ping(name)
        if ping:
            # After a failed ping, ping again at the next check.
            failed = any(self._parts[name].failed_pings for name in loaded if name in self._parts)
            self._next_pings = time.monotonic() + (0.0 if failed else _PING_INTERVAL_SECONDS)

    def _knows(self, loaded: list[str]) -> bool:
        """Whether each of these parts has a known process, and no known one has ended. Finding them reads a file for
        each process of the machine."""
        return self._processes.keys() >= set(loaded) and all(map(is_alive, self._processes.values()))

    def _ping(self, name: str) -> None:
        part, process = self._parts.setdefault(name, _PartState()), self._processes[name]
        try:
            result = self._control.ping(name, _REPLY_SECONDS)
        except httpx.HTTPError:
            # The connection to Triton failed: the next check handles that.
            return
        has_computed = _has_computed(process, part)
        if result.replied and result.stalled_seconds < _STALLED_SECONDS:
            part.failed_pings, part.last_healthy, part.slow_logged = 0, time.monotonic(), False
            return
        part.failed_pings += 1
        if not result.replied and _is_stopped(process.pid):
            self._restart(name, "hangs")
            return
        stalled = max(time.monotonic() - part.last_healthy, result.stalled_seconds)
        if part.failed_pings < _HANG_PINGS or stalled < _HANG_SECONDS:
            return
        if not (has_computed or _waits_for_machine(process)) or stalled >= _SLOW_SECONDS:
            self._restart(name, "hangs")
        elif not part.slow_logged:
            part.slow_logged = True
            terminal.say(f"the process of {name} is slow: no progress for {stalled:.1f} s, but it uses the processor")

    def _restart(self, name: str, problem: str) -> None:
        part = self._parts.setdefault(name, _PartState())
        if part.backoff.delay:
            return
        part.failed_pings, part.last_healthy = 0, time.monotonic()
        if process := self._processes.pop(name, None):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        count = f" ({part.backoff.consecutive_attempts + 1} times in a row)" if part.backoff.is_exhausted else ""
        terminal.say(f"the process of {name} {problem}{count}: restarting it")
        part.backoff.record_attempt()
        self._restart_counts.add(name)
        self._restarting[name] = time.monotonic()
        try:
            # Triton reloads a model that has not changed on disk only after an unload.
            self._control.unload(name)
            self._control.begin_load(name)
        except (ServingError, httpx.HTTPError) as error:
            terminal.say(f"{name} could not be restarted: {error}")

    def _update_restarting(self, loaded: list[str]) -> None:
        """Log the parts that are loaded again and those that have timed out."""
        for name, since in list(self._restarting.items()):
            seconds = time.monotonic() - since
            if name in loaded and name in self._processes:
                terminal.say(f"{name} is ready again after {seconds:.1f} s")
                del self._restarting[name]
            elif seconds > self._load_seconds:
                terminal.say(f"{name} is not ready {seconds:.0f} s after its restart; see Triton's log")
                del self._restarting[name]
            elif name not in loaded:
                # The connection to Triton failed: the next check handles that.
                with contextlib.suppress(httpx.HTTPError):
                    retry_failed_load(self._control, name, self._parts[name].backoff)


def retry_failed_load(control: TritonControl, name: str, backoff: RestartBackoff) -> bool:
    """Whether a model is loaded; its load is started again when it has failed and the backoff allows that."""
    try:
        return control.is_loaded(name)
    except ServingError as error:
        if not backoff.delay:
            terminal.say(f"{error}; trying again")
            backoff.record_attempt()
            with contextlib.suppress(ServingError):
                control.begin_load(name)
    return False


def _processes_of(triton: int) -> dict[str, psutil.Process]:
    """The live processes of Triton's models, by model name."""
    processes = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(triton).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if command and command[0].endswith(_STUB) and is_alive(process):
                    # The second to last argument is the instance: the model's name and two numbers.
                    processes[command[-2].rsplit("_", 2)[0]] = process
    return processes


def _has_computed(process: psutil.Process, part: _PartState) -> bool:
    """Whether its threads have used the processor since the last call."""
    now = time.monotonic()
    try:
        used = sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return False
    measured_at, before = part.cpu_measured_at, part.cpu_seconds
    part.cpu_seconds, part.cpu_measured_at = used, now
    return bool(used - before > _BUSY_CORE_SHARE * (now - measured_at))


def _waits_for_machine(process: psutil.Process) -> bool:
    """Whether a thread waits for a core, a disk or memory."""
    try:
        return any(_state(thread.id, process.pid) in "RD" for thread in process.threads())
    except psutil.NoSuchProcess:
        return False


def _state(thread: int, process: int) -> str:
    """The kernel's state letter. R: runs or waits for a core; D: waits for a disk or memory; S: sleeps …"""
    try:
        status = Path(f"/proc/{process}/task/{thread}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return " "
    return status.rpartition(")")[2].split()[0]


def _is_stopped(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
