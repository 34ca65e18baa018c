"""The one error of this room: something that keeps a training from beginning or going on, told in one line."""

from __future__ import annotations


class TrainingError(Exception):
    """The message is for a person, and names the option and the remedy."""
