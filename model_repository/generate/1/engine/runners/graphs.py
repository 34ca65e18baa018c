"""CUDA graphs of decoding steps: recorded once and replayed, because launching each kernel takes longer than it runs.

A recording has a fixed shape: the number of rows, and the context length of each row in slots (where attention reads
the blocks in place, the longest). A step runs in the smallest shape that holds it, padded with copies of its last row.
What the graphs of all steps share is here, too: buffers on the host, block tables, the recorder. It knows tensors and
shapes, and not requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..scheduling.blocks import PADDING_BLOCK
from ..scheduling.scheduler import Slice
from .flat_batch import LENGTH_STEP, AttentionGroup, FlatBatch
from .gpu.query_tiles import QueryTiles
from .interface import ForwardOutput

Compute = Callable[[], ForwardOutput]
# Records a computation. A call of the recording computes it again, in the same memory.
Recorder = Callable[[Compute], Compute]
# (rows, context length in slots).
Shape = tuple[int, int]
_LEAST_LENGTH = 128
Inputs = TypeVar("Inputs")


def rows_of_shape(count: int) -> int:
    """The next power of two; above 16 also the middle between two of them, for less padding."""
    power: int = 1 << (count - 1).bit_length()
    middle = power * 3 // 4
    return middle if power > 16 and count <= middle else power


def length_of_shape(length: int, longest: int) -> int:
    power: int = 1 << (length - 1).bit_length()
    return min(max(power, _LEAST_LENGTH), -(-longest // LENGTH_STEP) * LENGTH_STEP)


class HostBuffers:
    """The whole numbers of a recording's input, and their one copy to the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device_buffer = torch.zeros(size, dtype=torch.int32, device=device)
        # Two alternating host buffers: the copy of the previous step may still be in progress.
        self._host = [_HostBuffer(size, device) for _ in range(2)]

    def next(self) -> npt.NDArray[np.int32]:
        """The buffer of the next step, to be filled. It waits until the last copy of this buffer has ended."""
        self._host.reverse()
        return self._host[0].free()

    def send(self) -> None:
        self._host[0].copy_to(self.device_buffer)


class _HostBuffer:
    """A buffer that may be filled again when its copy to the device has ended, which no step needs to wait for."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._values = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def free(self) -> npt.NDArray[np.int32]:
        if self._copied:
            self._copied.synchronize()
        return self._values.numpy()

    def copy_to(self, buffer: torch.Tensor) -> None:
        buffer.copy_(self._values, non_blocking=True)
        if self._copied:
            self._copied.record(torch.cuda.current_stream(buffer.device))


class BlockTables:
    """The blocks of the sequences of a step, a row for each. Unused numbers are those of the padding block."""

    def __init__(self, rows: int, blocks: int) -> None:
        self.values = np.full((rows, blocks), PADDING_BLOCK, dtype=np.int32)
        # The list of blocks that each row holds, and how many of them: the list grows while its request runs, so mostly
        # nothing is copied.
        self._held: list[tuple[list[int], int]] = [([], 0) for _ in range(rows)]

    def hold(self, row: int, blocks: list[int]) -> None:
        """Make the row that of these blocks."""
        held, done = self._held[row]
        count = min(len(blocks), self.values.shape[1])
        if held is not blocks:
            self.values[row], done = PADDING_BLOCK, 0
        if done < count:
            self.values[row, done:count] = blocks[done:count]
        self._held[row] = (blocks, count)


class GraphInputs:
    """The input of a recording, in one buffer, so that one copy to the device is enough.

    At first it is zeros: a step on the padding block.
    """

    def __init__(
        self, rows: int, length: int, block_tokens: int, dtype: torch.dtype, device: torch.device, in_place: bool
    ) -> None:
        """`in_place`: attention reads the blocks where they lie."""
        self._rows, self._length, self._block_tokens, self._dtype = rows, length, block_tokens, dtype
        self._in_place = in_place
        self._blocks = -(-length // block_tokens)
        self._buffers = HostBuffers(rows * (2 + self._blocks), device)
        self._tables = BlockTables(rows, self._blocks)

    def fill(self, plan: Sequence[Slice], ids: torch.Tensor | None) -> None:
        """Copy the plan to the device. `ids` are its tokens if they exist on the device alone."""
        token_ids, positions, tables = self._parts(self._buffers.next())
        for row, piece in enumerate(plan):
            token_ids[row] = piece.ids[0] if ids is None else 0
            positions[row] = piece.start
            self._tables.hold(row, piece.request.table.blocks)
        tables[:] = self._tables.values
        last = len(plan) - 1
        for part in (token_ids, positions, tables):
            part[last + 1 :] = part[last]
        self._buffers.send()
        if ids is not None:
            device_ids = self._parts(self._buffers.device_buffer)[0]
            device_ids[: len(plan)] = ids
            device_ids[len(plan) :] = ids[-1]

    def batch(self) -> FlatBatch:
        """The batch as views of the device buffer: they hold the values at the time of the computation."""
        ids, starts, tables = self._parts(self._buffers.device_buffer)
        positions, tokens = starts.long(), self._block_tokens
        rows = torch.arange(self._rows, device=tables.device)
        common = (ids.long().unsqueeze(0), positions.unsqueeze(0))
        if self._in_place:
            block = tables.gather(1, (positions // tokens).unsqueeze(-1))[:, 0].long()
            sequences, ones = rows.int(), torch.ones_like(starts)
            tiles = QueryTiles(tables, sequences, ones, starts, sequences, height=1)
            return FlatBatch(*common, block * tokens + positions % tokens, [], rows, rows[:0], [tiles])
        slots = (tables.long().unsqueeze(-1) * tokens + torch.arange(tokens, device=tables.device)).flatten(1)
        own = slots.gather(1, positions.unsqueeze(-1))[:, 0]
        group = AttentionGroup(rows, 1, slots[:, : self._length], positions.unsqueeze(-1), self._dtype)
        return FlatBatch(*common, own, [group], rows, rows[:0])

    def _parts(self, values: Any) -> tuple[Any, Any, Any]:
        rows = self._rows
        return values[:rows], values[rows : 2 * rows], values[2 * rows :].reshape(rows, -1)


@dataclass(frozen=True)
class Recording(Generic[Inputs]):
    inputs: Inputs
    compute: Compute


class GraphCache:
    def __init__(
        self,
        compute: Callable[[FlatBatch], ForwardOutput],
        record: Recorder,
        block_tokens: int,
        longest: int,
        most_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        in_place: bool = False,
    ) -> None:
        """`in_place`: attention reads the blocks where they lie, so a recording serves every context length."""
        self._in_place = in_place
        self._compute, self._record = compute, record
        self._block_tokens, self._longest, self._dtype, self._device = block_tokens, longest, dtype, device
        self._most_slots = most_slots
        self.recordings: dict[Shape, Recording[GraphInputs]] = {}

    def shapes(self, most_rows: int) -> list[Shape]:
        """All shapes of up to `most_rows` rows that fit.

        The largest comes first, so that its gather buffer is large enough for all others.
        """
        rows = {rows_of_shape(count) for count in range(1, most_rows + 1)}
        lengths = {self._length(1 << bits) for bits in range(self._longest.bit_length() + 1)}
        return [shape for shape in sorted(product(rows, lengths), key=math.prod, reverse=True) if self._fits(shape)]

    def supports(self, plan: Sequence[Slice]) -> bool:
        """Whether the plan has one token for each slice and fits into the gather buffer."""
        plain = all(piece.count == 1 and not piece.request.needs_every_row for piece in plan)
        return plain and self._fits(self._shape(plan))

    def run(self, plan: Sequence[Slice], ids: torch.Tensor | None = None) -> ForwardOutput:
        """Run the plan. Its output, with a row of logits for each slice, is valid until the next run."""
        recording = self.recording(self._shape(plan), lambda inputs: inputs.fill(plan, ids))
        return recording.compute().first(len(plan))

    def _shape(self, plan: Sequence[Slice]) -> Shape:
        return rows_of_shape(len(plan)), self._length(max(piece.start + 1 for piece in plan))

    def _length(self, length: int) -> int:
        return length_of_shape(self._longest if self._in_place else length, self._longest)

    def _fits(self, shape: Shape) -> bool:
        """Whether the shape fits into the gather buffer: one long context pads all rows to its length."""
        return self._in_place or shape[1] <= _LEAST_LENGTH or math.prod(shape) <= self._most_slots

    def recording(self, shape: Shape, fill: Callable[[GraphInputs], None] = lambda _: None) -> Recording[GraphInputs]:
        """The recording of this shape. Recording computes the step, so the inputs are filled before."""
        recording = self.recordings.get(shape)
        inputs = recording.inputs if recording else self._inputs(shape)
        fill(inputs)
        if not recording:
            recording = self.recordings[shape] = Recording(inputs, self._record(lambda: self._compute(inputs.batch())))
        return recording

    def _inputs(self, shape: Shape) -> GraphInputs:
        return GraphInputs(*shape, self._block_tokens, self._dtype, self._device, self._in_place)


def measure(record: Sequence[Callable[[], object]], used: Callable[[], int]) -> int:
    """The bytes that these recordings take. The first is the largest, and its memory serves the others, too.

    So the second one shows what a further recording takes.
    """
    before = used()
    record[0]()
    size = largest = used() - before
    if len(record) > 1:
        record[1]()
        size += max(used() - before - largest, 0) * (len(record) - 1)
    return max(size, 0)


def run_eagerly(compute: Compute) -> Compute:
    """A recorder without CUDA graphs (on a CPU): a replay computes the step again."""
    return compute


class CudaRecorder:
    """Records CUDA graphs. They share one memory pool, because only one runs at a time.

    They also share one logits buffer. Otherwise each shape would keep rows × vocabulary of memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._logits = torch.empty(0, device=device)

    def __call__(self, compute: Compute) -> Compute:
        with torch.cuda.device(self._device):
            # Warm up on a side stream: libraries initialize at their first call, which must not be recorded.
            side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(2):
                    logits = compute().logits
            torch.cuda.current_stream().wait_stream(side_stream)
            if len(self._logits) < len(logits):
                self._logits = torch.empty_like(logits)
            del logits
            graph = torch.cuda.CUDAGraph()
            # Other engines of this process run meanwhile in their own threads.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                computed = compute()
                logits = self._logits[: len(computed.logits)]
                logits.copy_(computed.logits)
            output = ForwardOutput(logits, computed.hidden)
            del computed

        def replay() -> ForwardOutput:
            graph.replay()
            return output

        return replay
