"""As much of a request as a runner looks at: ids, and the blocks of the cache that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Table:
    blocks: list[int]


@dataclass
class Sequence:
    ids: list[int]
    blocks: list[int]
    needs_every_row: bool = True
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        self.table = Table(self.blocks)
