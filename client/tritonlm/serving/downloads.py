"""Downloads a model of the Hub before anything starts, and shows how far it is. `checkpoints.hub` does the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tritonlm.checkpoints.hub import Progress, fetch
from tritonlm.checkpoints.reference import Source

from . import terminal


def downloaded(source: Source) -> Path:
    """The source's folder or GGUF file on this machine. What the Hub's cache has is not downloaded again."""
    if isinstance(source, Path):
        return source
    with shown_progress(str(source)) as progress:
        return fetch(source, progress=progress)


@contextlib.contextmanager
def shown_progress(name: str) -> Iterator[Progress]:
    """Shows a download on the terminal, as soon as there is one."""
    with contextlib.ExitStack() as stack:
        show: Callable[[str], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(terminal.step(f"downloading {name}"))
            show(terminal.download_progress(name, done, total))

        yield progress
