"""Where an LM's adapters lie: the adapters file, read again when it changes, and the state of each adapter's files.

It looks at names and times, and reads no adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tritonlm.contract.adapters_file import AdapterEntry, read_adapters
from tritonlm.contract.errors import AdapterNotFound

from .peft_files import FILES

# Time, size and inode of a file; None if it is missing.
_Stat = tuple[int, int, int] | None


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's files as they are now. Two that are equal hold the same content."""

    name: str
    folder: Path
    stats: tuple[_Stat, ...]


class AdapterFolders:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stat: _Stat = None
        self._adapters: dict[str, AdapterEntry] = {}

    def find(self, name: str) -> AdapterSource:
        """Raises AdapterNotFound, or CheckpointError for an adapters file that is broken."""
        adapters = self._current()
        if name not in adapters:
            raise AdapterNotFound.of(name, self._file.stem, adapters)
        folder = Path(adapters[name].path)
        return AdapterSource(name, folder, tuple(_stat(folder / file) for file in FILES))

    def names(self) -> Collection[str]:
        return self._current().keys()

    def _current(self) -> dict[str, AdapterEntry]:
        with self._lock:
            if (stat := _stat(self._file)) != self._stat or stat is None:
                self._adapters, self._stat = read_adapters(self._file), stat
            return self._adapters


def _stat(file: Path) -> _Stat:
    try:
        stat = file.stat()
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
