"""Which requests were being computed when a process died: so its successor can tell the one that kills from others.

Before a step the requests in it are written to a file that outlives the process; the next process of the same model and
Triton reads it. A request that was in two processes that died, and alone in the second one's last step, is not run
again. Whoever was merely beside it runs apart for some steps, and is free then. It knows fingerprints and a file, not
how steps are planned.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..request import Request

# More requests than can be in a step, at some 40 bytes each.
_FILE_BYTES = 1 << 18
# Who has come through so many steps is not what kills at once.
_SETTLED_STEPS = 3
# For so many steps a suspect runs apart, longer where it went on and killed again; after so many in all it is none.
_APART_STEPS, _LONG_APART_STEPS, HARMLESS_STEPS = 2, 64, 64
_DEATHS = 2
_REMEMBERED_SECONDS = 3600.0
_MOST_SUSPECTS = 1000


@dataclass(frozen=True)
class Suspect:
    """A request that was in a step when its process died."""

    deaths: int
    # In the last of them: whether it had just begun, and whether it was the only one in the step.
    young: bool
    alone: bool
    at: float

    @property
    def kills(self) -> bool:
        return self.deaths >= _DEATHS and self.alone

    @property
    def apart_steps(self) -> int:
        if self.deaths > _DEATHS:
            return _LONG_APART_STEPS
        return _APART_STEPS if self.young or self.deaths == _DEATHS else 0


def fingerprint(request: Request) -> str:
    """The same for all tries of a request: what has come of it already, and its time, are left out."""
    parameters = replace(request.parameters, resume_token_ids=(), timeout=None)
    told = hashlib.blake2b(repr(parameters).encode(), digest_size=12)
    told.update(array("q", request.prompt_ids).tobytes())
    return told.hexdigest()


class StepJournal:
    def __init__(self, file: Path) -> None:
        self._suspects = _suspects_of(_read(file))
        self._file = file
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, _FILE_BYTES)
            self._memory = mmap.mmap(descriptor, _FILE_BYTES)
        finally:
            os.close(descriptor)
        self._written: list[tuple[str, bool]] | None = None
        self.note(())

    def suspect(self, request: Request) -> Suspect | None:
        return self._suspects.get(request.fingerprint)

    def clear(self, request: Request) -> None:
        """It has come through many steps: whatever killed, it was not this one."""
        if self._suspects.pop(request.fingerprint, None):
            self._written = None

    def note(self, requests: Iterable[Request]) -> None:
        """These are computed next; nothing is written where they are those of the last step."""
        entries = [(request.fingerprint, request.steps < _SETTLED_STEPS) for request in requests]
        if entries == self._written:
            return
        self._written = entries
        suspects = {name: vars(suspect) for name, suspect in self._suspects.items()}
        text = json.dumps({"step": entries, "suspects": suspects}).encode()
        if len(text) + 8 > _FILE_BYTES:
            text = b"{}"
        # Whoever is killed in the midst of this leaves an empty journal, not half of one.
        self._memory[:8] = bytes(8)
        self._memory[8 : 8 + len(text)] = text
        self._memory[:8] = len(text).to_bytes(8, "little")

    def close(self) -> None:
        """This process ends by itself: its requests have ended, and nothing is to be told."""
        self._memory.close()
        self._file.unlink(missing_ok=True)


def journal_file(model: str, number: int, loaded: str) -> Path:
    """Of an engine of this model under this Triton, with these weights. What Tritons that are gone left is removed."""
    folder, start = Path(tempfile.gettempdir()), f"tritonlm-steps-{os.getuid()}-"
    for left in folder.glob(f"{start}*"):
        parent = left.name.removeprefix(start).split("-")[0]
        if parent.isdigit() and not Path(f"/proc/{parent}").exists():
            with contextlib.suppress(OSError):
                left.unlink()
    weights = hashlib.blake2b(loaded.encode(), digest_size=6).hexdigest()
    return folder / f"{start}{os.getppid()}-{model}-{number}-{weights}"


def _read(file: Path) -> dict[str, object]:
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
            size = min(int.from_bytes(opened.read(8), "little"), _FILE_BYTES)
            found = json.loads(opened.read(size) or b"{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _suspects_of(journal: dict[str, object]) -> dict[str, Suspect]:
    """Those of the process that has died: the ones in its last step, and the ones before that were not cleared."""
    now = time.time()
    try:
        suspects = {str(name): Suspect(**fields) for name, fields in dict(journal.get("suspects", {})).items()}  # type: ignore[call-overload]
        step = [(str(name), bool(young)) for name, young in list(journal.get("step", []))]  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return {}
    suspects = {name: found for name, found in suspects.items() if now - found.at < _REMEMBERED_SECONDS}
    for name, young in step:
        before = suspects.pop(name, None)
        suspects[name] = Suspect(1 + (before.deaths if before else 0), young, len(step) == 1, now)
    return dict(list(suspects.items())[-_MOST_SUSPECTS:])
