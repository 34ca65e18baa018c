"""The three models that an LM's ensemble ties together: their names, by themselves or behind the LM's own."""

from __future__ import annotations

TOKENIZE, GENERATE, DETOKENIZE = PARTS = ("tokenize", "generate", "detokenize")


def part_of(model: str) -> str:
    """Which of the parts a model of this name is; empty for any other model."""
    last = model.rpartition("-")[2]
    return last if last in PARTS else ""
