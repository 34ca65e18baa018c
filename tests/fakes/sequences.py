"""A fake request with the attributes that a runner reads: token ids, and their blocks of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from engine.adapters.loaded import LoadedAdapter


@dataclass
class Table:
    blocks: list[int]


@dataclass
class Sequence:
    ids: list[int]
    blocks: list[int]
    needs_every_row: bool = True
    embeds: bool = False
    adapter: LoadedAdapter | None = None
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        self.table = Table(self.blocks)


def every_logits(runner: Any, plan: AbstractSequence[Any]) -> torch.Tensor:
    """The logits of all rows of a plan, computed from their hidden states."""
    computed = runner.forward(plan)
    parts = [part.clone() for part in runner.project(computed, range(len(computed.hidden)))]
    return torch.cat([computed.logits[:0], *parts])
