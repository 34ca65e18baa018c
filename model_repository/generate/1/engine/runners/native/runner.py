"""A model on a CPU, computed by kernels of our own: one call for a whole step, behind the runner's interface.

It hands pointers over. It knows neither requests' parameters nor text; what its families' files hold they know.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract import Checkpoint

from ...config import INT8, EngineConfig
from ...memory import return_freed
from ...monitoring.progress import Progress
from ...sampling.logit_filters import DrawSettings
from ...sampling.logprobs import Scores
from ...sampling.sampler import Best
from ...sampling.scratch import rows_at_once
from ...scheduling.scheduler import Slice
from ..interface import Computed, engine_memory, weights_on_disk
from ..kv_cache import KVCache, LayerShape, cache_size
from . import gpt2, llama
from .structures import POINTER, Draw, Project, Score, Step
from .weights import LANES, Packing

_FAMILIES = {model_type: family for family in (gpt2, llama) for model_type in family.MODEL_TYPES}
_BEYOND = 16
# As the kernels count them.
PARTS = ("products", "attention", "logits", "other")


def why_not(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """What of this checkpoint the kernels cannot compute; empty where they can."""
    if checkpoint.config.get("model_type") not in _FAMILIES:
        return f"its model_type is none of {', '.join(_FAMILIES)}"
    if dtype not in (torch.float32, torch.bfloat16):
        return "it computes in another type than float32 or bfloat16"
    try:
        reason: str = _FAMILIES[checkpoint.config["model_type"]].why_not(checkpoint.config)
    except (TypeError, ValueError, AttributeError):
        # Numbers that are none, lists for objects: whoever loads it then says what is wrong.
        return "its config.json is not as those of its family are"
    return reason


class NativeRunner:
    """`library` holds the kernels."""

    def __init__(
        self, folder: Path, config: EngineConfig, device: torch.device, dtype: torch.dtype, library: ctypes.CDLL
    ) -> None:
        checkpoint = Checkpoint(folder)
        self.device, self.dtype, self.vocab_size = device, dtype, checkpoint.vocab_size
        self._library, in_bytes = library, config.weights == INT8
        self.memory = engine_memory(config, device)
        self.memory.announce(weights_on_disk(checkpoint, torch.int8 if in_bytes else dtype))
        self._progress = Progress()
        self.spent: ctypes.Array[ctypes.c_double] | None = None
        family = _FAMILIES[checkpoint.config["model_type"]]
        # What the kernels point to stays there.
        self._packing = Packing(folder, family.PREFIX, dtype, in_bytes, library)
        self._model = family.read(checkpoint, self._packing)
        self._packing.close_files()
        return_freed()
        heads, head = self._model.heads // self._model.shared, self._model.head_width
        shapes = [LayerShape(heads, head, head)] * self._model.layers
        left = self.memory.measure()
        size = cache_size(shapes, config, checkpoint.context_length, dtype, device, left)
        self.blocks, self.context_length = self.memory.open_pool(size, grows=True), size.context_length
        # More than is used: the kernels read sixteen keys at a time, beyond the last block's end.
        more = _BEYOND // config.block_tokens + 1
        self._cache = KVCache(shapes, self.blocks + more, config.block_tokens, dtype, device)
        self._keys, self._values = (
            (POINTER * len(shapes))(*(tensor.data_ptr() for tensor in tensors))
            for tensors in (self._cache.keys, self._cache.values)
        )
        library.open_model.restype = POINTER
        library.open_model.argtypes = [POINTER, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.step_model.argtypes = [POINTER, POINTER]
        for function in (library.draw_tokens, library.project_rows, library.score_rows):
            function.argtypes = [POINTER, POINTER]
        library.close_model.argtypes = [POINTER]
        threads = config.threads or len(os.sched_getaffinity(0))
        # For sampling, which is torch's.
        torch.set_num_threads(threads)
        self._opened = library.open_model(ctypes.byref(self._model), dtype == torch.bfloat16, in_bytes, threads)

    def watch(self, progress: Progress) -> None:
        # It has to outlive the steps that write to it.
        self._progress = progress

    def time_parts(self) -> ctypes.Array[ctypes.c_double]:
        """From now on each step adds its seconds to these, in the order of PARTS."""
        self.spent = (ctypes.c_double * len(PARTS))()
        return self.spent

    def forward(self, plan: Sequence[Slice]) -> Computed:
        ids: list[int] = []
        places: list[int] = []
        sequences: list[int] = []
        logit_rows: list[int] = []
        hidden_rows: list[int] = []
        for number, piece in enumerate(plan):
            logit_rows += (len(ids) + row for row in piece.logit_rows)
            hidden_rows += (len(ids) + row for row in piece.hidden_rows)
            ids += piece.ids
            places += range(piece.start, piece.start + piece.count)
            sequences += [number] * piece.count
        tables = np.zeros((len(plan), max(len(piece.request.table.blocks) for piece in plan)), np.int32)
        for number, piece in enumerate(plan):
            blocks = piece.request.table.blocks
            tables[number, : len(blocks)] = blocks
        logits = torch.empty(len(logit_rows), self._stride)
        hidden = torch.empty(len(hidden_rows), self._model.width)
        best, best_ids = torch.empty(len(logit_rows)), torch.empty(len(logit_rows), dtype=torch.int64)
        arrays = [np.asarray(numbers, np.int32) for numbers in (ids, places, sequences, logit_rows, hidden_rows)]
        step = Step(
            len(ids), len(logit_rows), len(hidden_rows), tables.shape[1], self._cache.block_tokens, logits.shape[1],
            *(array.ctypes.data for array in (*arrays, tables)),
            ctypes.addressof(self._keys), ctypes.addressof(self._values), logits.data_ptr(), hidden.data_ptr(),
            best.data_ptr(), best_ids.data_ptr(),
            self._spent_address, self._progress.address,
        )  # fmt: skip
        self._library.step_model(self._opened, ctypes.byref(step))
        return Computed(logits[:, : self.vocab_size], hidden, Best(best, best_ids))

    @property
    def _stride(self) -> int:
        """From one row of logits to the next: the kernels write whole vectors."""
        return self.vocab_size + -self.vocab_size % LANES

    @property
    def _spent_address(self) -> int | None:
        return None if self.spent is None else ctypes.addressof(self.spent)

    def project(self, computed: Computed, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        step = rows_at_once(4 * self._stride)
        # One piece of memory for all slices: fresh memory costs time.
        logits = torch.empty(min(step, len(rows)), self._stride)
        for start in range(0, len(rows), step):
            numbers = np.asarray(rows[start : start + step], np.int32)
            wanted = Project(
                len(numbers), self._stride, computed.hidden.data_ptr(), numbers.ctypes.data, logits.data_ptr(),
                self._spent_address, self._progress.address,
            )  # fmt: skip
            self._library.project_rows(self._opened, ctypes.byref(wanted))
            yield logits[: len(numbers), : self.vocab_size]

    def score(self, logits: torch.Tensor, rows: Sequence[int], ids: Sequence[int], alternatives: int) -> Scores:
        count = min(alternatives, logits.shape[1])
        usable, own = torch.empty(len(rows), dtype=torch.uint8), torch.empty(len(rows))
        best_ids, best = torch.empty(len(rows), count, dtype=torch.int64), torch.empty(len(rows), count)
        numbers, tokens = np.asarray(rows, np.int32), np.asarray(ids, np.int64)
        wanted = Score(
            len(rows), logits.shape[1], logits.stride(0), count, logits.data_ptr(), numbers.ctypes.data,
            tokens.ctypes.data, *(tensor.data_ptr() for tensor in (usable, own, best_ids, best)),
        )  # fmt: skip
        self._library.score_rows(self._opened, ctypes.byref(wanted))
        return Scores(usable, own, best_ids, best)

    def draw(
        self,
        logits: torch.Tensor,
        settings: Sequence[DrawSettings],
        uniforms: npt.NDArray[np.float64],
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        numbers = np.asarray(range(len(settings)) if rows is None else rows, np.int32)
        ids = torch.empty(len(settings), dtype=torch.int64)
        temperatures, min_p = (
            np.array([getattr(row, n) for row in settings], np.float64) for n in ("temperature", "min_p")
        )
        top_k = np.array([row.top_k for row in settings], np.int32)
        lost = np.array([1 - row.top_p for row in settings], np.float32)
        wanted = Draw(
            len(settings), logits.shape[1], logits.stride(0), logits.data_ptr(), numbers.ctypes.data,
            *(array.ctypes.data for array in (temperatures, top_k, lost, min_p, uniforms)), ids.data_ptr(),
        )  # fmt: skip
        self._library.draw_tokens(self._opened, ctypes.byref(wanted))
        return ids

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)

    def close(self) -> None:
        self._library.close_model(self._opened)
        self.memory.close()
