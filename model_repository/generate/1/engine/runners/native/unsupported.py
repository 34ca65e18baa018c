"""Why the kernels do not support a checkpoint."""

from __future__ import annotations


class Unsupported(Exception):
    """Its text completes "the kernels do not support it: …"."""
