"""Random logits, and the state of one sequence to be sampled from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from engine.sampling.sampler import SamplingState
from tritonlm.contract import SamplingParameters

VOCABULARY = 61  # odd, so that the rows of a batch have different alignments


def some_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def state(
    seed: int = 0, vocabulary: int = VOCABULARY, prompt: Sequence[int] = (1, 2), **parameters: Any
) -> SamplingState:
    return SamplingState(SamplingParameters(**parameters), seed, vocabulary, prompt)
