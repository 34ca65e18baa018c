"""Training data: two built-in generators, files, and data sets on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..examples import Examples


@dataclass(frozen=True)
class Data:
    """Training and held-out examples, and the evaluation of a finished model."""

    name: str
    train: Examples
    held_out: Examples
    tokenizer: PreTrainedTokenizerFast
    description: str
    # What the record's accuracy is a share of; empty: no accuracy is reported.
    accuracy: str = ""
    # Computes the accuracy of the finished model; without it, accuracy is the exact-match share of held-out examples.
    evaluate: Callable[[Any], float] | None = None
    # Prompts for the samples in the report.
    prompts: list[str] = field(default_factory=list)
