"""Decoding steps that are recorded once and replayed: on a GPU, launching a step's work piece by piece takes longer
than the work itself.

A recording has a fixed shape: so many rows, each looking back at so many slots. A step is copied into the smallest one
that holds it, and its last row fills up what is left. It knows tensors and shapes, not what requests want.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ..scheduling.blocks import PADDING_BLOCK
from ..scheduling.scheduler import Slice
from .flat_batch import LENGTH_STEP, AttentionGroup, FlatBatch
from .interface import Computed

Compute = Callable[[], Computed]
# What makes a recording of a computation: calling it computes the same again, on the same memory.
Record = Callable[[Compute], Compute]
# How many rows, and how many slots each of them looks back at.
Shape = tuple[int, int]
_LEAST_LENGTH = 128


def rows_of_shape(count: int) -> int:
    """Powers of two; from 16 on also the middle between two of them: fewer rows in vain."""
    power: int = 1 << (count - 1).bit_length()
    middle = power * 3 // 4
    return middle if power > 16 and count <= middle else power


def length_of_shape(length: int, longest: int) -> int:
    power: int = 1 << (length - 1).bit_length()
    return min(max(power, _LEAST_LENGTH), -(-longest // LENGTH_STEP) * LENGTH_STEP)


class Inputs:
    """The numbers that differ from step to step, in one piece of memory: one copy brings all of them.

    Until it is filled they are zeros: a step on the padding block.
    """

    def __init__(self, rows: int, length: int, block_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows, self._length, self._block_tokens, self._dtype = rows, length, block_tokens, dtype
        self._blocks = -(-length // block_tokens)
        numbers = rows * (2 + self._blocks)
        self._there = torch.zeros(numbers, dtype=torch.int64, device=device)
        # By turns: what the last step was filled from may still be on its way.
        pinned = device.type == "cuda"
        self._here = [torch.zeros(numbers, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]

    def fill(self, plan: Sequence[Slice], ids: torch.Tensor | None) -> None:
        """`ids`: the tokens, where they are on the device already, and nobody here has seen them."""
        self._here.reverse()
        numbers = self._here[0].numpy().reshape(-1)
        known, places, tables = self._parts(numbers)
        tables.fill(PADDING_BLOCK)
        for row, piece in enumerate(plan):
            known[row] = piece.ids[0] if ids is None else 0
            places[row] = piece.start
            blocks = piece.request.table.blocks[: self._blocks]
            tables[row, : len(blocks)] = blocks
        last = len(plan) - 1
        for part in (known, places, tables):
            part[last + 1 :] = part[last]
        self._there.copy_(self._here[0], non_blocking=True)
        if ids is not None:
            of_rows = self._parts(self._there)[0]
            of_rows[: len(plan)] = ids
            of_rows[len(plan) :] = ids[-1]

    def batch(self) -> FlatBatch:
        """Made of the numbers as they are on the device when it is computed."""
        ids, places, tables = self._parts(self._there)
        tokens = self._block_tokens
        slots = (tables.unsqueeze(-1) * tokens + torch.arange(tokens, device=tables.device)).flatten(1)
        own = slots.gather(1, places.unsqueeze(-1))[:, 0]
        rows = torch.arange(self._rows, device=tables.device)
        group = AttentionGroup(rows, 1, slots[:, : self._length], places.unsqueeze(-1), self._dtype)
        return FlatBatch(ids.unsqueeze(0), places.unsqueeze(0), own, [group], rows, rows[:0])

    def _parts(self, numbers: Any) -> tuple[Any, Any, Any]:
        rows = self._rows
        return numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :].reshape(rows, -1)


@dataclass(frozen=True)
class Recording:
    inputs: Inputs
    compute: Compute


class Graphs:
    def __init__(
        self,
        compute: Callable[[FlatBatch], Computed],
        record: Record,
        block_tokens: int,
        longest: int,
        most_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._compute, self._record = compute, record
        self._block_tokens, self._longest, self._dtype, self._device = block_tokens, longest, dtype, device
        self._most_slots = most_slots
        self.recordings: dict[Shape, Recording] = {}

    def prepare(self, most_rows: int) -> None:
        """Record the steps of up to so many rows, before anybody waits for one.

        The largest comes first: what it reads through holds the smaller ones, too.
        """
        rows = {rows_of_shape(count) for count in range(1, most_rows + 1)}
        lengths = {length_of_shape(1 << bits, self._longest) for bits in range(self._longest.bit_length() + 1)}
        for shape in sorted(product(rows, lengths), key=math.prod, reverse=True):
            if self._fits(shape):
                self._recording(shape)

    def suits(self, plan: Sequence[Slice]) -> bool:
        """Whether every sequence goes one token further, nothing else is wanted, and there is room to read through."""
        plain = all(piece.count == 1 and not piece.request.needs_every_row for piece in plan)
        return plain and self._fits(self._shape(plan))

    def run(self, plan: Sequence[Slice], ids: torch.Tensor | None = None) -> Computed:
        """The plan's rows. What it gives is good until the next one is run."""
        recording = self._recording(self._shape(plan), lambda inputs: inputs.fill(plan, ids))
        return recording.compute().first(len(plan))

    def _shape(self, plan: Sequence[Slice]) -> Shape:
        return rows_of_shape(len(plan)), length_of_shape(max(piece.start + 1 for piece in plan), self._longest)

    def _fits(self, shape: Shape) -> bool:
        """One long context among many short ones would have all of them read as far as that one."""
        return shape[1] <= _LEAST_LENGTH or math.prod(shape) <= self._most_slots

    def _recording(self, shape: Shape, fill: Callable[[Inputs], None] = lambda _: None) -> Recording:
        """Filled before it is made, too: making it computes."""
        found = self.recordings.get(shape)
        inputs = found.inputs if found else Inputs(*shape, self._block_tokens, self._dtype, self._device)
        fill(inputs)
        if not found:
            found = self.recordings[shape] = Recording(inputs, self._record(lambda: self._compute(inputs.batch())))
        return found


def again(compute: Compute) -> Compute:
    """Where there are no graphs (on a CPU) a recording is computed anew each time."""
    return compute


class CudaRecorder:
    """Recordings as CUDA graphs, which share their memory: one runs at a time.

    Their logits, too, lie in one piece of memory: each shape's own would stay taken, rows times vocabulary of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._logits = torch.empty(0, device=device)

    def __call__(self, compute: Compute) -> Compute:
        with torch.cuda.device(self._device):
            # Libraries set themselves up when they are first called, which must not be recorded.
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    logits = compute().logits
            torch.cuda.current_stream().wait_stream(aside)
            if len(self._logits) < len(logits):
                self._logits = torch.empty_like(logits)
            del logits
            graph = torch.cuda.CUDAGraph()
            # Other engines of this process go on meanwhile, each in a thread of its own.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                computed = compute()
                logits = self._logits[: len(computed.logits)]
                logits.copy_(computed.logits)
            found = Computed(logits, computed.hidden)
            del computed

        def replay() -> Computed:
            graph.replay()
            return found

        return replay
