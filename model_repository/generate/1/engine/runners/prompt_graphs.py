"""CUDA graphs of steps with prompts: recorded for some numbers of tokens, and replayed with chunks of any size.

A step is one flat row of tokens: prompt chunks and the decoding rows beside them. It runs in the smallest recording
that holds its tokens. What is missing are padding tokens, which are written to the padding block and attend to nothing,
and tiles without rows. Attention reads the blocks where they lie; gathered, each set of context lengths would need a
recording of its own. Launching the kernels of a step one by one takes longer than computing some hundred tokens.
It knows tensors and shapes, and not requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..scheduling.scheduler import Slice
from .flat_batch import FlatBatch
from .gpu import query_tiles
from .gpu.query_tiles import QueryTiles
from .graphs import BlockTables, HostBuffers, Recorder, Recording, rows_of_shape
from .interface import ForwardOutput

# Fewer tokens are padded to as many: they take as long.
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class PromptShape:
    tokens: int
    # The most sequences, and the blocks of each at most.
    sequences: int
    blocks: int
    # Rows of a prompt's tile.
    height: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each part of the input has: ids, positions, cache slots; rows of logits; tiles; tables."""
        decoding = min(self.sequences, self.tokens)
        prompts = self.tokens // self.height + min(self.sequences, self.tokens // 2)
        return *[self.tokens] * 3, self.sequences, *[decoding] * 4, *[prompts] * 4, self.sequences * self.blocks


class PromptInputs:
    """The input of a recording, in one buffer, so that one copy to the device is enough. At first it is all padding."""

    def __init__(self, shape: PromptShape, block_tokens: int, device: torch.device) -> None:
        self._shape, self._block_tokens = shape, block_tokens
        self._buffers = HostBuffers(sum(shape.sizes), device)
        self._tables = BlockTables(shape.sequences, shape.blocks)

    def fill(self, plan: Sequence[Slice]) -> None:
        """Copy the plan to the device."""
        values = self._buffers.next()
        ids, positions, slots, logit_rows, *tiles, tables = self._parts(values)
        # Padding. The tables are written as a whole.
        values[: -len(tables)] = 0
        for row, piece in enumerate(plan):
            self._tables.hold(row, piece.request.table.blocks)
        tables[:] = self._tables.values.reshape(-1)
        counts, starts = (np.array([getattr(piece, name) for piece in plan]) for name in ("count", "start"))
        firsts = np.cumsum(counts) - counts
        sequences = np.repeat(np.arange(len(plan)), counts)
        total, tokens = len(sequences), self._block_tokens
        own = np.arange(total) - firsts[sequences] + starts[sequences]
        ids[:total] = [token_id for piece in plan for token_id in piece.ids]
        positions[:total] = own
        slots[:total] = self._tables.values[sequences, own // tokens] * tokens + own % tokens
        ends = [first + piece.count - 1 for first, piece in zip(firsts, plan, strict=True) if piece.samples]
        logit_rows[: len(ends)] = ends
        for part, members, height in (
            (tiles[:4], np.flatnonzero(counts == 1), 1), (tiles[4:], np.flatnonzero(counts > 1), self._shape.height),
        ):  # fmt: skip
            rows = query_tiles.tiles_of(firsts[members], counts[members], starts[members], members, height)
            for column, numbers in zip(part, rows, strict=True):
                column[: len(numbers)] = numbers
        self._buffers.send()

    def batch(self) -> FlatBatch:
        """The batch as views of the device buffer: they hold the values at the time of the computation."""
        ids, positions, slots, logit_rows, *tiles, tables = self._parts(self._buffers.device_buffer)
        tables = tables.view(self._shape.sequences, -1)
        groups = [_tiles(tables, tiles[:4], 1), _tiles(tables, tiles[4:], self._shape.height)]
        rows = logit_rows.long()
        return FlatBatch(ids.long()[None], positions.long()[None], slots.long(), [], rows, rows[:0], groups)

    def _parts(self, values: Any) -> list[Any]:
        ends = np.cumsum(self._shape.sizes).tolist()
        return [values[end - size : end] for size, end in zip(self._shape.sizes, ends, strict=True)]


def _tiles(tables: torch.Tensor, parts: Sequence[torch.Tensor], height: int) -> QueryTiles:
    rows, counts, starts, sequences = parts
    return QueryTiles(tables, rows, counts, starts, sequences, height)


class PromptGraphs:
    def __init__(
        self, compute: Callable[[FlatBatch], ForwardOutput], record: Recorder, shape: PromptShape, block_tokens: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """`shape` has the most tokens that a step may have."""
        self._compute, self._record, self._largest = compute, record, shape
        self._block_tokens, self._device = block_tokens, device
        # By the number of tokens.
        self.recordings: dict[int, Recording[PromptInputs]] = {}

    def shapes(self) -> list[int]:
        """The numbers of tokens that are recorded, the largest first."""
        return sorted({self._tokens(count) for count in range(1, self._largest.tokens + 1)}, reverse=True)

    def supports(self, plan: Sequence[Slice]) -> bool:
        """Whether the plan fits, needs no hidden states, and has one row of logits for each slice at most."""
        plain = not any(piece.request.needs_every_row or piece.draft_tokens for piece in plan)
        fits = len(plan) <= self._largest.sequences and sum(piece.count for piece in plan) <= self._largest.tokens
        return plain and fits

    def run(self, plan: Sequence[Slice]) -> ForwardOutput:
        """Run the plan. Its output is valid until the next run of any recording."""
        recording = self.recording(sum(piece.count for piece in plan), lambda inputs: inputs.fill(plan))
        return recording.compute().first(sum(piece.samples for piece in plan))

    def recording(self, count: int, fill: Callable[[PromptInputs], None] = lambda _: None) -> Recording[PromptInputs]:
        """The recording that holds so many tokens. Recording computes the step, so the inputs are filled before."""
        tokens = self._tokens(count)
        recording = self.recordings.get(tokens)
        inputs = recording.inputs if recording else self._inputs(tokens)
        fill(inputs)
        if not recording:
            recording = Recording(inputs, self._record(lambda: self._compute(inputs.batch())))
            self.recordings[tokens] = recording
        return recording

    def _inputs(self, tokens: int) -> PromptInputs:
        return PromptInputs(replace(self._largest, tokens=tokens), self._block_tokens, self._device)

    def _tokens(self, count: int) -> int:
        return rows_of_shape(max(count, _LEAST_TOKENS))
