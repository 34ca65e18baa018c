"""As much of a request as a runner looks at: ids, and the blocks of the cache that hold them."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Table:
    blocks: list[int]


@dataclass
class Sequence:
    ids: list[int]
    blocks: list[int]
    needs_every_row: bool = True
    embeds: bool = False
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        self.table = Table(self.blocks)


def every_logits(runner: Any, plan: Several[Any]) -> torch.Tensor:
    """The logits of all rows of a plan, from their hidden states."""
    computed = runner.forward(plan)
    parts = [part.clone() for part in runner.project(computed, range(len(computed.hidden)))]
    return torch.cat([computed.logits[:0], *parts])
