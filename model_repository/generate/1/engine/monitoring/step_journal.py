"""The step journal: records the requests of each step, so that a restarted process can find one that kills processes.

Before a step its requests are written to a file that outlives the process, and its Triton if that is started again. The
next process of the same model reads it. Its last steps count only if the Triton is the same: when a Triton dies, its
processes die whatever they compute. The engines of a process die together, so they share the file, and the last steps
of all of them count as one. A request is rejected if it was in the last steps of two processes that died, and alone in
the second ones. Other requests of such steps run isolated for some steps, and are cleared then. This module knows
fingerprints and a file, and not how steps are planned.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tritonlm.contract.process_files import process_file, process_files, series_of

from ..request import Request

_KIND = "steps"
# Enough for more requests than a step can have, at about 40 bytes each.
_FILE_BYTES = 1 << 18
# A request with at least this many steps did not kill the process at its start.
_SETTLED_STEPS = 3
# Isolated steps of a suspect, and of a suspect with more than two deaths; after HARMLESS_STEPS steps it is cleared.
_ISOLATED_STEPS, _LONG_ISOLATED_STEPS, HARMLESS_STEPS = 2, 64, 64
_DEATHS = 2
_SUSPECT_SECONDS = 3600.0
_MAX_SUSPECTS = 1000

# The requests of a step: the fingerprint of each, and whether it has just begun.
_Entries = list[tuple[str, bool]]


@dataclass(frozen=True)
class Suspect:
    """A request that was in a step when its process died."""

    deaths: int
    # In the last of them: whether the request had just begun, and whether it was the only one in the engines' steps.
    young: bool
    alone: bool
    died_at: float

    @property
    def is_killer(self) -> bool:
        return self.deaths >= _DEATHS and self.alone

    @property
    def isolated_steps(self) -> int:
        if self.deaths > _DEATHS:
            return _LONG_ISOLATED_STEPS
        return _ISOLATED_STEPS if self.young or self.deaths == _DEATHS else 0


def fingerprint(request: Request) -> str:
    """Identifies all attempts of a request: resumed tokens and the timeout are left out."""
    parameters = replace(request.parameters, resume_token_ids=(), timeout=None)
    digest = hashlib.blake2b(repr(parameters).encode(), digest_size=12)
    digest.update(array("q", request.prompt_ids).tobytes())
    return digest.hexdigest()


class StepJournal:
    """The part of one engine in the journal of its process."""

    def __init__(self, shared: _SharedJournal, number: int) -> None:
        self._shared, self._number = shared, number

    def suspect(self, request: Request) -> Suspect | None:
        return self._shared.suspects.get(request.fingerprint)

    def clear(self, request: Request) -> None:
        """Clear a request that has run many steps since: it is not the killer."""
        self._shared.clear(request.fingerprint)

    def record(self, requests: Iterable[Request]) -> None:
        """Record the requests of the engine's next step, unless they are those of its last one."""
        self._shared.record(
            self._number, [(request.fingerprint, request.steps < _SETTLED_STEPS) for request in requests]
        )

    def close(self) -> None:
        """Leave the journal: this engine ends normally, and its requests have ended. The last one removes it."""
        self._shared.leave(self._number)


class _SharedJournal:
    """The file of a process: the current step of each engine, and the suspects, which all engines know."""

    def __init__(self, file: Path, engines: int) -> None:
        self.suspects = _suspects_of(_read(file))
        self._file, self._triton = file, os.getppid()
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, _FILE_BYTES)
            self._memory = mmap.mmap(descriptor, _FILE_BYTES)
        finally:
            os.close(descriptor)
        # Each engine writes from its own thread.
        self._lock = threading.Lock()
        self._steps: dict[int, _Entries] = {number: [] for number in range(engines)}
        # Whether the suspects have changed since the last write.
        self._is_stale = False
        self._write()

    def clear(self, name: str) -> None:
        with self._lock:
            if self.suspects.pop(name, None):
                self._is_stale = True

    def record(self, number: int, entries: _Entries) -> None:
        with self._lock:
            if entries != self._steps[number] or self._is_stale:
                self._steps[number] = entries
                self._write()

    def leave(self, number: int) -> None:
        with self._lock:
            del self._steps[number]
            if self._steps:
                self._write()
                return
            self._memory.close()
        self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        suspects = {name: vars(suspect) for name, suspect in self.suspects.items()}
        steps = list(self._steps.values())
        text = json.dumps({"triton": self._triton, "steps": steps, "suspects": suspects}).encode()
        if len(text) + 8 > _FILE_BYTES:
            text = b"{}"
        # The length is 0 during the write, so that a process killed here leaves an empty journal, not half of one.
        self._memory[:8] = bytes(8)
        self._memory[8 : 8 + len(text)] = text
        self._memory[:8] = len(text).to_bytes(8, "little")
        self._is_stale = False


def open_journals(file: Path, engines: int = 1) -> list[StepJournal]:
    """The journal of a process with so many engines: the part of each."""
    shared = _SharedJournal(file, engines)
    return [StepJournal(shared, number) for number in range(engines)]


def journal_file(model: str, fingerprint: str) -> Path:
    """The journal of a process of this model, series of Tritons and weights."""
    weights = hashlib.blake2b(fingerprint.encode(), digest_size=6).hexdigest()
    return process_file(_KIND, series_of(os.getppid()), f"{model}-{weights}")


def has_served() -> bool:
    """Whether an engine of this Triton has been ready, this process's or another one's: its journal stays."""
    triton = os.getppid()
    return any(_read(file).get("triton") == triton for file in process_files(_KIND, series_of(triton)))


def _read(file: Path) -> dict[str, object]:
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
            size = min(int.from_bytes(opened.read(8), "little"), _FILE_BYTES)
            journal = json.loads(opened.read(size) or b"{}")
    except (OSError, ValueError):
        return {}
    return journal if isinstance(journal, dict) else {}


def _suspects_of(journal: dict[str, object]) -> dict[str, Suspect]:
    """The suspects after the death of a process: the requests of its last steps, and earlier suspects not cleared."""
    now = time.time()
    try:
        suspects = {str(name): Suspect(**fields) for name, fields in dict(journal.get("suspects", {})).items()}  # type: ignore[call-overload]
        last = journal.get("steps", []) if journal.get("triton") == os.getppid() else []
        entries = {str(name): bool(young) for step in list(last) for name, young in step}  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return {}
    suspects = {name: suspect for name, suspect in suspects.items() if now - suspect.died_at < _SUSPECT_SECONDS}
    for name, young in entries.items():
        before = suspects.pop(name, None)
        suspects[name] = Suspect(1 + (before.deaths if before else 0), young, len(entries) == 1, now)
    return dict(list(suspects.items())[-_MAX_SUSPECTS:])
