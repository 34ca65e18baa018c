"""Files in the temporary folder that belong to one Triton process: their names, and the removal of stale ones."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def has_process_file(kind: str, triton_pid: int) -> bool:
    """Whether this Triton has a file of this kind."""
    return any(Path(tempfile.gettempdir()).glob(f"{_prefix(kind)}{triton_pid}-*"))


def process_file(kind: str, triton_pid: int, name: str) -> Path:
    """The file of this kind and name for this Triton. Files of Tritons that have ended are removed."""
    folder, prefix = Path(tempfile.gettempdir()), _prefix(kind)
    for file in folder.glob(f"{prefix}*"):
        pid = file.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                file.unlink()
    return folder / f"{prefix}{triton_pid}-{name}"


def _prefix(kind: str) -> str:
    return f"tritonlm-{kind}-{os.getuid()}-"
