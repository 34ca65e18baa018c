"""Edits of a file by several processes: a lock from reading to writing, and replacement as a whole.

A reader, which takes no lock, sees the old content or the new one. A link stays a link: its target is edited.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import CheckpointError

_READABLE_BY_ALL = 0o644
# An edit takes milliseconds; a process that is stopped holds its lock.
LOCK_SECONDS, _POLL_SECONDS = 30.0, 0.02


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder: a file beside it, which stays. Folders that are missing are created."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("a") as lock:
        take_lock(lock, path)
        yield


def take_lock(lock: IO[str], path: Path) -> None:
    """Lock an open file, until it is closed. `path`: what the lock is for."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"another process has been editing {path} for {LOCK_SECONDS:.0f} s; end it and try again"
                ) from None
        time.sleep(_POLL_SECONDS)


def replace_text(file: Path, text: str, mode: int | None = None) -> None:
    """Write the file. Without `mode` it keeps its own, and all may read a new one: a server may run as another user."""
    file = file.resolve()
    if mode is None:
        mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else _READABLE_BY_ALL
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
