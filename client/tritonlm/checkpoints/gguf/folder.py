"""Writes a checkpoint folder for a GGUF file: everything but the weights, which stay in the file.

    config.json  tokenizer.json  tokenizer_config.json  generation_config.json  gguf_tensors.json  model.gguf → the file

Folders are kept in a cache, named by a hash of the files' paths, sizes and times. A file that changes gets another one,
and the earlier one is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from tritonlm.contract.errors import CheckpointError

from .split_files import part_files

# Changes when folders are written otherwise.
_FORMAT = 2
# Where a folder is written before it gets its name. One as old as this, in seconds, was left by a process that died.
_WORK, _WORK_SECONDS = ".work-", 3600


def prepare(file: Path) -> Path:
    """The checkpoint folder of a GGUF file, or of any part of a split one; raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    files = [part.absolute() for part in part_files(file)]
    target = _cache() / _key(files)
    if (target / "config.json").is_file():
        return target
    # It needs numpy. A folder that is there, as at most starts, needs none.
    from .contents import write_contents  # noqa: PLC0415
    from .model_file import open_model  # noqa: PLC0415

    model = open_model(file.absolute())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=_WORK))
        try:
            write_contents(work, model, files)
            work.chmod(0o755)
            _publish(work, target)
            _remove_others(target, files[0])
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; set XDG_CACHE_HOME to another folder"
        ) from error
    return target


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritonlm" / "gguf"
    except RuntimeError:
        raise CheckpointError("this user has no home folder; set HOME or XDG_CACHE_HOME, for prepared files") from None


def _key(files: list[Path]) -> str:
    facts: list[object] = [_FORMAT]
    for part in files:
        try:
            stat = part.stat()
        except OSError:
            raise CheckpointError(f"{part} is one part of several, and it is missing") from None
        facts.append((str(part), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _remove_others(target: Path, first: Path) -> None:
    """The folders of earlier contents of the same file, and what processes left that died while they wrote."""
    for folder in target.parent.iterdir():
        # Another process may remove it at the same time.
        with contextlib.suppress(OSError):
            if folder != target and (_is_abandoned(folder) or _is_of(folder, first)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    return folder.name.startswith(_WORK) and time.time() - folder.stat().st_mtime > _WORK_SECONDS


def _is_of(folder: Path, first: Path) -> bool:
    links = [] if folder.name.startswith(_WORK) else folder.glob("*.gguf")
    return any(link.readlink() == first for link in links if link.is_symlink())


def _publish(work: Path, target: Path) -> None:
    """Another process may have written the same folder meanwhile."""
    try:
        work.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
