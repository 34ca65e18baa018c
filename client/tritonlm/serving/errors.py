"""Errors that keep a local Triton from serving. Each message is one line that names the remedy."""

from __future__ import annotations


class ServingError(Exception):
    """`message` is for a person at a terminal; `detail` is printed below it, for example the last lines of a log."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class TritonUnresponsive(ServingError):
    """Triton's process exists but does not respond: it hangs, or is about to die."""
