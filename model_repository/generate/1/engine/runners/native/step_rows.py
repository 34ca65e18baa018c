"""The rows of a step as the kernels read them: flat, those of one adapter one after the other.

It knows slices and their block tables, not what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...scheduling.scheduler import Slice
from .adapters import NativeAdapter


class StepRows:
    """Holds the arrays that Step points to."""

    def __init__(self, plan: Sequence[Slice]) -> None:
        slots = self._place_adapters(plan)
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        first_rows = [0] * len(plan)
        # Slices without an adapter come first; else the plan's order is kept.
        for number in sorted(range(len(plan)), key=slots.__getitem__):
            part = plan[number]
            first_rows[number] = len(ids)
            ids += part.ids
            positions += range(part.start, part.start + part.count)
            sequences += [number] * part.count
        # The outputs have the plan's order.
        logit_rows = [first + row for first, part in zip(first_rows, plan, strict=True) for row in part.logit_rows]
        hidden_rows = [first + row for first, part in zip(first_rows, plan, strict=True) for row in part.hidden_rows]
        self.count, self.logit_count, self.hidden_count = len(ids), len(logit_rows), len(hidden_rows)
        self._arrays = [np.asarray(n, np.int32) for n in (ids, positions, sequences, logit_rows, hidden_rows)]
        self.block_tables = np.zeros((len(plan), max(len(part.request.table.blocks) for part in plan)), np.int32)
        for number, part in enumerate(plan):
            blocks = part.request.table.blocks
            self.block_tables[number, : len(blocks)] = blocks

    @property
    def addresses(self) -> list[int]:
        """Of Step's fields from `ids` to `block_tables`."""
        return [array.ctypes.data for array in (*self._arrays, self.block_tables)]

    @property
    def adapter_addresses(self) -> list[int]:
        """Of Step's fields `adapters` and `adapter_rows`."""
        return [self._adapter_pointers.ctypes.data, self._adapter_rows.ctypes.data]

    @property
    def adapter_count(self) -> int:
        return len(self.adapters)

    def _place_adapters(self, plan: Sequence[Slice]) -> list[int]:
        """For each slice the number of its adapter, from 1 on, or 0."""
        numbers: dict[int, int] = {}
        # Held until the step ends.
        self.adapters: list[NativeAdapter] = []
        slots: list[int] = []
        rows = [0]
        for part in plan:
            adapter = part.request.adapter and part.request.adapter.weights
            if adapter is not None and id(adapter) not in numbers:
                assert isinstance(adapter, NativeAdapter)
                self.adapters.append(adapter)
                numbers[id(adapter)] = len(self.adapters)
                rows.append(0)
            slots.append(0 if adapter is None else numbers[id(adapter)])
            rows[slots[-1]] += part.count
        self._adapter_rows = np.cumsum(rows, dtype=np.int32)
        self._adapter_pointers = np.array([adapter.address for adapter in self.adapters], np.uintp)
        return slots
