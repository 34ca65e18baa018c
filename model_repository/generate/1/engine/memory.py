"""The memory that all engines of one Triton may take together: each enters what it needs before it takes it.

They are processes of their own, so the book is a file, under a lock, named after the Triton that started them all. Who
dies without leaving is struck off by the next who looks. It knows bytes and devices, and nothing of what lies in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tritonlm.contract import CheckpointError, NoRoom

_PAGE = os.sysconf("SC_PAGE_SIZE")
# For each process, what it has entered for each device.
Entries = dict[str, dict[str, int]]


class MemoryBook:
    """This process's part in it. A budget of 0 is none: then there is no book."""

    def __init__(self, budget: int, file: Path | None = None) -> None:
        self._budget = budget
        self._file = file or Path(tempfile.gettempdir()) / f"tritonlm-memory-{os.getuid()}-{os.getppid()}.json"

    def reserve(self, device: str, needed: int) -> None:
        """Enter this process's need, in place of what it entered before; NoRoom tells by how much it is too much."""
        if not self._budget:
            return
        if needed > self._budget:
            raise CheckpointError(
                f"this model needs {_shown(needed)} on {device}, and the memory budget is {_shown(self._budget)}; "
                "raise the budget, or lower max_sequences, max_context_tokens or kv_cache_tokens"
            )
        with self._open() as entries:
            me = str(os.getpid())
            taken = sum(entry.get(device, 0) for pid, entry in entries.items() if pid != me)
            if taken + needed > self._budget:
                raise NoRoom.of(needed, taken, self._budget)
            entries[me] = {**entries.get(me, {}), device: needed}

    def leave(self) -> None:
        """The last one takes the book along. Else the entry stays: what it tells of is free when the process ends."""
        if self._budget:
            with self._open() as entries:
                if entries.keys() <= {str(os.getpid())}:
                    entries.clear()

    @contextlib.contextmanager
    def _open(self) -> Iterator[Entries]:
        """The entries of those who live, to be changed; after an error the file stays as it was."""
        with self._locked() as file:
            written: Entries = json.loads(file.read() or "{}")
            entries = {pid: entry for pid, entry in written.items() if _lives(pid)}
            yield entries
            file.seek(0)
            file.truncate()
            json.dump(entries, file)
            if not entries:
                self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        while True:
            # Nobody else's business, and no link that somebody laid there is followed.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(self._file, flags, 0o600), "r+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # The last one to leave removes the file: whoever waited for its lock holds nothing.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file.fileno()).st_ino == self._file.stat().st_ino:
                        yield file
                        return


def _lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    # What has ended and waits for its parent to notice holds no memory any more.
    return state not in "ZX"


def resident_memory() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * _PAGE


def return_freed() -> None:
    """Give back what loading has used and freed: the C library would keep some of it, once more and once less."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _shown(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
