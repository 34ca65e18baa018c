"""Downloads a model of the Hub before anything starts, and shows how far it is. `checkpoints.hub` does the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from tritonlm.checkpoints.hub import fetch
from tritonlm.checkpoints.reference import Source

from . import terminal


def downloaded(source: Source) -> Path:
    """The source's folder or GGUF file on this machine. What the Hub's cache has is not downloaded again."""
    if isinstance(source, Path):
        return source
    with contextlib.ExitStack() as stack:
        show: Callable[[str], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(terminal.step(f"downloading {source}"))
            show(terminal.download_progress(str(source), done, total))

        return fetch(source, progress=progress)
