"""An adapter as requests refer to it: its content's identity, and the runner's own weights. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class AdapterWeights(Protocol):
    """An adapter in a runner's own layout. Only the runner that made it reads it."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    name: str
    # The sha-256 of the files' content: what the prefix cache keeps apart.
    identity: str
    weights: AdapterWeights
