"""The rows of a step as the kernels read them: flat, those of one adapter one after the other.

It knows slices and their block tables, not what is computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

from ...scheduling.scheduler import Slice
from .adapters import NativeAdapter
from .structures import INT_CODE, POINTER_CODE, address_of


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
        tables = [part.request.table.blocks for part in plan]
        self.table_width = max(map(len, tables))
        block_tables = [block for table in tables for block in (*table, *[0] * (self.table_width - len(table)))]
        # All in one array, so that one address is looked up.
        parts = (ids, positions, sequences, logit_rows, hidden_rows, block_tables)
        self._numbers = array(INT_CODE, [number for part in parts for number in part])
        self._starts = list(accumulate(map(len, parts), initial=0))[: len(parts)]

    @property
    def addresses(self) -> list[int]:
        """Of Step's fields from `ids` to `block_tables`."""
        first = address_of(self._numbers)
        return [first + start * self._numbers.itemsize for start in self._starts]

    @property
    def adapter_addresses(self) -> list[int]:
        """Of Step's fields `adapters` and `adapter_rows`."""
        return [address_of(self._adapter_pointers), address_of(self._adapter_rows)]

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
        self._adapter_rows = array(INT_CODE, accumulate(rows))
        self._adapter_pointers = array(POINTER_CODE, [adapter.address for adapter in self.adapters])
        return slots
