"""The error of this package: a reason why a training cannot start or continue, as one line."""

from __future__ import annotations


class TrainingError(Exception):
    """The message names the option and the remedy."""
