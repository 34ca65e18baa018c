"""Keeps what a training leaves on disk whole: a checkpoint that was cut short is taken away, a full disk is told.

A checkpoint's record is written last, so one without it is not complete. It knows files, and nothing of training.
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
# Where the final one is written before it takes its place.
ASIDE = f".{FINAL}"
# How torch and safetensors tell that a write failed.
_FAILED_WRITE = re.compile(
    r"PytorchStreamWriter failed|unexpected pos|iostream error|IoError|No space left|File too large"
)


@contextlib.contextmanager
def kept_whole(out: Path) -> Iterator[None]:
    """Whatever ends the work inside, only complete checkpoints stay."""
    discard_incomplete(out)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) or _FAILED_WRITE.search(str(error)):
            why = (error.strerror if isinstance(error, OSError) else None) or "the disk may be full"
            raise TrainingError(
                f"out: {out} cannot be written ({why}); complete checkpoints are kept: make room, then go on with "
                f"tritonlm train --resume --out {out}"
            ) from None
        raise
    finally:
        discard_incomplete(out)


def discard_incomplete(out: Path) -> None:
    for folder in _checkpoints(out):
        if not (folder / RECORD).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out / ASIDE, ignore_errors=True)


def last_checkpoint(out: Path) -> str | None:
    found = max(_checkpoints(out), key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return str(found) if found else None


def put_in_place(out: Path) -> Path:
    """The complete final checkpoint takes the place of an earlier one."""
    shutil.rmtree(out / FINAL, ignore_errors=True)
    os.replace(out / ASIDE, out / FINAL)
    return out / FINAL


def _checkpoints(out: Path) -> list[Path]:
    return [folder for folder in out.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]
