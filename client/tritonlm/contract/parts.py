"""The three models that an LM's ensemble ties together: their names, by themselves or behind the LM's own."""

from __future__ import annotations

from pathlib import Path

TOKENIZE, GENERATE, DETOKENIZE = PARTS = ("tokenize", "generate", "detokenize")


def language_model_of(model: str, checkpoint: Path) -> str:
    """The LM whose part this is; the plain trio's own name tells nothing, but the folder of its checkpoint does."""
    name, _, _ = model.rpartition("-")
    if name:
        return name
    return checkpoint.parent.name if checkpoint.name.isdecimal() else checkpoint.name


def part_of(model: str) -> str:
    """Which of the parts a model of this name is; empty for any other model."""
    last = model.rpartition("-")[2]
    return last if last in PARTS else ""
