"""Where training data come from: two generators of our own, files, and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..examples import Examples


@dataclass(frozen=True)
class Data:
    """What is learnt, and how one sees whether it has been."""

    name: str
    train: Examples
    held_out: Examples
    tokenizer: PreTrainedTokenizerFast
    description: str
    # What the record's accuracy is a share of; without it there is none.
    accuracy: str = ""
    # How the finished model is judged; without it accuracy is the share of held-out answers that are right as a whole.
    judge: Callable[[Any], float] | None = None
    # Prompts for the samples in the report.
    prompts: list[str] = field(default_factory=list)
