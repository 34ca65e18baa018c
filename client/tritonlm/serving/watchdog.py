"""Watches over the processes of a Triton's models, and has Triton start those again that have died or hang.

Triton itself does neither: a killed model process is never restarted, and its model stays "ready". A model is dead when
its process is gone. It hangs when it makes no progress: it does not answer, or its engine's counter stands still, and
its threads compute nothing either. Whoever makes progress is slow, and is left alone. It looks when it is told to, on
the caller's thread, and knows one Triton's processes; Triton's own life is the supervisor's matter.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from . import terminal
from .backoff import Patience
from .control import TritonControl
from .errors import ServingError
from .repairs import Repairs

_PING_EVERY_SECONDS = 1.0
# Commands are answered at once, whatever a step takes: an answer that takes longer is a bad sign, as is an engine whose
# progress has stood still for long.
_ANSWER_SECONDS, _STILL_SECONDS = 1.0, 3.0
# So many bad signs in a row, over at least so long, mean that the process hangs; one that somebody has stopped
# (SIGSTOP) will not answer however long one waits.
_HANGING_LOOKS, _HANGING_SECONDS = 3, 3.5
# One whose threads compute or wait for a disk is slow, not hung; it may be for so long (it might spin).
_SLOW_SECONDS = 60.0
# A thread that has used this share of a core since the last look computes.
_COMPUTING_SHARE = 0.05
_SILENT_LOOKS = 3
_STUB = "triton_python_backend_stub"


@dataclass
class _Part:
    # Looks in a row that saw a bad sign, when the last good one was, and whether it was called slow since.
    bad_looks: int = 0
    well_at: float = field(default_factory=time.monotonic)
    called_slow: bool = False
    # Seconds of processor time that its process had used, and when that was seen.
    computed: float = 0.0
    computed_at: float = 0.0
    patience: Patience = field(default_factory=Patience)


class Watchdog:
    def __init__(self, control: TritonControl, load_seconds: float, repairs: Repairs) -> None:
        self._control, self._load_seconds, self._repairs = control, load_seconds, repairs
        self._parts: dict[str, _Part] = {}
        self._processes: dict[str, psutil.Process] = {}
        self._next_pings = 0.0
        # Those that are being started again, and since when.
        self._coming: dict[str, float] = {}
        # Looks in a row at which Triton itself gave no answer.
        self._silent_looks = 0

    @property
    def triton_hangs(self) -> bool:
        """Whether Triton itself has given no answer for long."""
        return self._silent_looks >= _SILENT_LOOKS

    def forget(self) -> None:
        """Triton has been started anew: nothing of what was seen holds."""
        self._processes.clear()
        self._coming.clear()
        self._silent_looks = 0
        for part in self._parts.values():
            part.bad_looks, part.well_at = 0, time.monotonic()

    def look(self, triton: int) -> None:
        """Repair what has died since the last look; from time to time, ask everybody for a sign of life."""
        ping = time.monotonic() >= self._next_pings
        if not ping and not self._coming and all(map(_lives, self._processes.values())):
            return
        try:
            loaded = self._control.loaded_parts()
            self._silent_looks = 0
        except (ServingError, httpx.HTTPError):
            # Who has been stopped will not answer however often one looks.
            self._silent_looks += _SILENT_LOOKS if _is_stopped(triton) else 1
            return
        self._processes = _processes_of(triton)
        self._greet(loaded)
        for name in loaded:
            if name not in self._processes:
                self._repair(name, "has died")
            elif ping:
                self._ping(name)
        if ping:
            # Whoever looks bad is looked at again at once.
            bad = any(self._parts[name].bad_looks for name in loaded if name in self._parts)
            self._next_pings = time.monotonic() + (0.0 if bad else _PING_EVERY_SECONDS)

    def _ping(self, name: str) -> None:
        part, process = self._parts.setdefault(name, _Part()), self._processes[name]
        try:
            sign = self._control.ping(name, _ANSWER_SECONDS)
        except httpx.HTTPError:
            # The connection to Triton: the next look tells.
            return
        computes = _computes(process, part)
        if sign.answered and sign.still_seconds < _STILL_SECONDS:
            part.bad_looks, part.well_at, part.called_slow = 0, time.monotonic(), False
            return
        part.bad_looks += 1
        if not sign.answered and _is_stopped(process.pid):
            self._repair(name, "hangs")
            return
        silent = max(time.monotonic() - part.well_at, sign.still_seconds)
        if part.bad_looks < _HANGING_LOOKS or silent < _HANGING_SECONDS:
            return
        if not computes or silent >= _SLOW_SECONDS:
            self._repair(name, "hangs")
        elif not part.called_slow:
            part.called_slow = True
            terminal.say(f"the process of {name} is slow: no sign of life for {silent:.1f} s, but it computes")

    def _repair(self, name: str, what: str) -> None:
        part = self._parts.setdefault(name, _Part())
        if part.patience.pause:
            return
        part.bad_looks, part.well_at = 0, time.monotonic()
        if process := self._processes.pop(name, None):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        often = f" ({part.patience.in_a_row + 1} times in a row)" if part.patience.is_over else ""
        terminal.say(f"the process of {name} {what}{often}: starting it again")
        part.patience.note()
        self._repairs.note(name)
        self._coming[name] = time.monotonic()
        try:
            # Triton would not load what has not changed on disk, unless it is gone.
            self._control.unload(name)
            self._control.begin_load(name)
        except (ServingError, httpx.HTTPError) as error:
            terminal.say(f"{name} could not be started again: {error}")

    def _insist(self, name: str) -> None:
        """Of one that is not back yet: where its load has failed, begin it once more."""
        try:
            self._control.is_loaded(name)
        except ServingError as error:
            patience = self._parts[name].patience
            if not patience.pause:
                terminal.say(f"{error}; trying again")
                patience.note()
                with contextlib.suppress(ServingError):
                    self._control.begin_load(name)
        except httpx.HTTPError:
            return

    def _greet(self, loaded: list[str]) -> None:
        """Tell of those that are back, and of those that stay away."""
        for name, since in list(self._coming.items()):
            seconds = time.monotonic() - since
            if name in loaded and name in self._processes:
                terminal.say(f"{name} is back after {seconds:.1f} s")
                del self._coming[name]
            elif seconds > self._load_seconds:
                terminal.say(f"{name} is not back after {seconds:.0f} s; see Triton's log")
                del self._coming[name]
            elif name not in loaded:
                self._insist(name)


def _processes_of(triton: int) -> dict[str, psutil.Process]:
    """The living processes of Triton's models, by the model's name."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(triton).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if command and command[0].endswith(_STUB) and _lives(process):
                    # The last but one argument is the instance: the model's name and two numbers.
                    found[command[-2].rsplit("_", 2)[0]] = process
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _computes(process: psutil.Process, part: _Part) -> bool:
    """Whether its threads have computed since the last look, or could if they had a core or what they read."""
    now = time.monotonic()
    try:
        used = sum(process.cpu_times()[:2])
        waits = any(_state(thread.id, process.pid) in "RD" for thread in process.threads())
    except psutil.NoSuchProcess:
        return False
    since, before = part.computed_at, part.computed
    part.computed, part.computed_at = used, now
    return waits or used - before > _COMPUTING_SHARE * (now - since)


def _state(thread: int, process: int) -> str:
    """R: runs or waits for a core; D: waits for a disk or for memory; S: sleeps …"""
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
