"""Keeps out of a process what transformers imports wherever it is installed and no training uses.

It knows which packages transformers asks for, not what is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Data sets of this package are an alternative to those that the Trainer gets here; scipy is for losses of other tasks.
# With both, the imports of a training take a fifth longer.
_QUESTIONS = ("is_datasets_available", "is_scipy_available")


@contextlib.contextmanager
def without_unused_packages() -> Iterator[None]:
    """What transformers imports inside does without datasets and scipy; anything else can import them as usual."""
    from transformers import utils  # noqa: PLC0415 (slow to import, and in an optional extra)

    answers = {name: getattr(utils, name) for name in _QUESTIONS}
    for name in _QUESTIONS:
        setattr(utils, name, lambda: False)
    try:
        yield
    finally:
        for name, answer in answers.items():
            setattr(utils, name, answer)
