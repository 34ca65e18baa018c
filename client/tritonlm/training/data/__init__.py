"""Where training data come from: two generators of our own, files, and the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    # Whether an answer counts only when all of it is right.
    exact: bool = False
    # Prompts for the samples in the report.
    prompts: list[str] = field(default_factory=list)
