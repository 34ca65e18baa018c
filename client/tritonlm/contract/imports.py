"""Imports at the start of a process. It knows Python's garbage collector and modules, not what is imported."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import ModuleType


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


@contextlib.contextmanager
def without_modules(*names: str) -> Iterator[None]:
    """Inside, these modules are empty: parts of libraries that are slow to import and that this process never uses.

    Modules that are imported already stay; the others can be imported as usual afterwards.
    """
    left_out = {name: ModuleType(name) for name in names if name not in sys.modules}
    sys.modules.update(left_out)
    try:
        yield
    finally:
        for name in left_out:
            sys.modules.pop(name, None)
