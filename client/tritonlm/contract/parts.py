"""The names of the three models in an LM's ensemble: plain (`generate`), or prefixed with the LM's name."""

from __future__ import annotations

from pathlib import Path

TOKENIZE, GENERATE, DETOKENIZE = PARTS = ("tokenize", "generate", "detokenize")


def language_model_of(model: str, checkpoint: Path) -> str:
    """The LM that this part belongs to. For a plain name it is taken from the checkpoint's folder.

    In the Hub's cache that is models--ORG--NAME/snapshots/COMMIT.
    """
    name, _, _ = model.rpartition("-")
    if name:
        return name
    if checkpoint.parent.name == "snapshots":
        return checkpoint.parent.parent.name.rpartition("--")[2]
    return checkpoint.parent.name if checkpoint.name.isdecimal() else checkpoint.name


def part_of(model: str) -> str:
    """The part that a model of this name is; empty for any other model."""
    last = model.rpartition("-")[2]
    return last if last in PARTS else ""
