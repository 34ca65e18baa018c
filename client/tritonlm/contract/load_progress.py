"""The progress of loading a checkpoint: the loading process writes it, and the process that waits reads it.

A file of 16 bytes holds two numbers: bytes loaded and total bytes. Its name holds the Triton's process id and the
model. It exists while the load runs. This module knows files and processes, not tensors.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from .process_files import process_file

_FORMAT = struct.Struct("<qq")


@dataclass(frozen=True)
class Loaded:
    """Bytes of a checkpoint's weights."""

    done: int
    total: int


class LoadProgress:
    """Counts the bytes of loaded tensors and writes them to `file`, if there is one."""

    def __init__(self, total: int = 0, file: Path | None = None) -> None:
        self.done, self.total, self._file = 0, total, file
        self._write()

    def add(self, count: int) -> None:
        self.done = min(self.done + count, self.total)
        self._write()

    def close(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._file is None:
            return
        # A load must not fail because its progress cannot be written.
        with contextlib.suppress(OSError):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.pwrite(descriptor, _FORMAT.pack(self.done, self.total), 0)
            finally:
                os.close(descriptor)


def load_file(triton_pid: int, model: str) -> Path:
    """The file in which a model of this Triton reports its load."""
    return process_file("load", triton_pid, model)


def read_progress(file: Path) -> Loaded | None:
    """The progress in this file; None if there is no file or it is not valid."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        content = os.pread(descriptor, _FORMAT.size, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return Loaded(*_FORMAT.unpack(content)) if len(content) == _FORMAT.size else None
