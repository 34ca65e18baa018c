"""Files in the temporary folder of one Triton process, or of a series of them: their names, and removal of stale ones.

A series is the Tritons that a supervisor starts one after the other.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

# The owner of what outlives a Triton, PID-TOKEN: the process that starts it again, and a word for this series.
SERIES = "TRITONLM_TRITON_SERIES"


def series_of(triton_pid: int) -> str:
    """The series of this Triton, the parent of this process; the Triton itself if nobody starts it again."""
    return os.environ.get(SERIES) or str(triton_pid)


def process_files(kind: str, owner: int | str) -> list[Path]:
    """The files of this kind of a Triton, or of a series."""
    return list(Path(tempfile.gettempdir()).glob(f"{_prefix(kind)}{owner}-*"))


def process_file(kind: str, owner: int | str, name: str) -> Path:
    """The file of this kind and name of a Triton, or of a series. Those of owners that have ended are removed."""
    folder, prefix = Path(tempfile.gettempdir()), _prefix(kind)
    for file in folder.glob(f"{prefix}*"):
        pid = file.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                file.unlink()
    return folder / f"{prefix}{owner}-{name}"


def _prefix(kind: str) -> str:
    return f"tritonlm-{kind}-{os.getuid()}-"
