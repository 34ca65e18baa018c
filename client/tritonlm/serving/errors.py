"""The errors of this room: something that keeps a local Triton from serving, told in one line with its remedy."""

from __future__ import annotations


class ServingError(Exception):
    """The message is for a person at a terminal; `detail` is shown below it, such as the last lines of a log."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class NoAnswer(ServingError):
    """Triton is there, but has stopped to answer: it hangs, or is about to die."""
