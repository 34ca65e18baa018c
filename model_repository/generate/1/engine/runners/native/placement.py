"""Where the checkpoint's linear layers lie in the matrices of a program's operations.

The matrices of an adapter take the same places (adapters.py). This module knows indices, not numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .linear import Linear, Qkv, Reader
from .padding import padded


@dataclass(frozen=True)
class Part:
    """Outputs of an operation that one layer computes."""

    layer: str
    layer_outputs: int
    # The layer's outputs in the operation's order, with PADDING between; zeros follow up to `size`.
    outputs: Sequence[int]
    size: int


@dataclass(frozen=True)
class Placement:
    """Of one operation. Its parts lie one below the other, or blocks of two parts alternate."""

    parts: tuple[Part, ...]
    layer_inputs: int
    # For each of the operation's inputs the layers' input, or PADDING.
    inputs: Sequence[int]
    interleaved: bool = False

    @property
    def layers(self) -> list[str]:
        """Each once, in the order of their first part."""
        return list(dict.fromkeys(part.layer for part in self.parts))


class Placements:
    """Of a program; `prefix` is that of a layer's name within the checkpoint."""

    def __init__(self) -> None:
        # By the number of the operation.
        self.of: dict[int, Placement] = {}
        # All layers of a model share one list of indices.
        self._qkv_orders: dict[bool, list[list[int]]] = {}

    def place_qkv(
        self, operation: int, source: Qkv, prefix: str, reader: Reader, inputs: int, rows: Sequence[int]
    ) -> None:
        """`rows` is the order of queries, keys and values one below the other."""
        orders = self._qkv_orders.setdefault(len(source.sources) > 1, [])
        if not orders:
            orders += reader.qkv_order(source, rows)
        parts = tuple(
            Part(prefix + layer.name, count, order, len(order))
            for layer, count, order in zip(source.sources, reader.qkv_outputs(source), orders, strict=True)
        )
        self.of[operation] = Placement(parts, inputs, range(inputs))

    def place_linear(
        self, operation: int, sources: Sequence[Linear], prefix: str, outputs: int, columns: Sequence[int], inputs: int
    ) -> None:
        """One layer, or a pair of gate and up; `columns` is the order of the inputs."""
        parts = tuple(
            Part(
                prefix + source.name, outputs * source.parts,
                range(source.part * outputs, (source.part + 1) * outputs), padded(outputs),
            )
            for source in sources
        )  # fmt: skip
        self.of[operation] = Placement(parts, inputs, columns, interleaved=len(parts) == 2)
