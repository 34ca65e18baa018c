"""Keeps only complete checkpoints on disk: incomplete ones are removed, and a full disk is reported.

A checkpoint's record is written last, so a checkpoint without a record is incomplete. This module knows files only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import TrainingError
from .record import RECORD

FINAL = "final"
# The folder in which the final checkpoint is written before it is renamed.
STAGING = f".{FINAL}"
# Messages of torch and safetensors for a failed write.
_FAILED_WRITE = re.compile(
    r"PytorchStreamWriter failed|unexpected pos|iostream error|IoError|No space left|File too large"
)


@contextlib.contextmanager
def complete_checkpoints_only(out: Path) -> Iterator[None]:
    """Remove incomplete checkpoints at entry and at exit, also after an error."""
    discard_incomplete(out)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) or _FAILED_WRITE.search(str(error)):
            reason = (error.strerror if isinstance(error, OSError) else None) or "the disk may be full"
            raise TrainingError(
                f"out: {out} cannot be written ({reason}); complete checkpoints are kept: free disk space, then run "
                f"tritonlm train --resume --out {out}"
            ) from None
        raise
    finally:
        discard_incomplete(out)


def discard_incomplete(out: Path) -> None:
    for folder in _checkpoints(out):
        if not (folder / RECORD).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out / STAGING, ignore_errors=True)


def last_checkpoint(out: Path) -> str | None:
    latest = max(_checkpoints(out), key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return str(latest) if latest else None


def publish_final(out: Path) -> Path:
    """Rename the staging folder to `final`, replacing an earlier one."""
    shutil.rmtree(out / FINAL, ignore_errors=True)
    os.replace(out / STAGING, out / FINAL)
    return out / FINAL


def _checkpoints(out: Path) -> list[Path]:
    return [folder for folder in out.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]
