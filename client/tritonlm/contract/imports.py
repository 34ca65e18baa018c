"""Imports at the start of a process. It knows Python's garbage collector, not what is imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Inside, the garbage collector does not run; the objects that exist at the end are never looked at again.

    Imports make many objects that stay, and each full collection looks at all of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
