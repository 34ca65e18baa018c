"""A model on a CPU, computed by the C++ kernels: one call for a whole step, behind the runner's interface.

It passes pointers to the kernels. It knows neither requests' parameters nor text nor families (families/).
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract import Checkpoint
from tritonlm.contract.load_progress import LoadProgress

from ...adapters.lora import LoraAdapter
from ...config import INT8, EngineConfig
from ...interrupt import Interrupt
from ...memory import trim_heap
from ...monitoring.progress import Progress
from ...sampling.logit_filters import SamplingSettings
from ...sampling.logprobs import Ids, Scores
from ...sampling.sampler import Argmax
from ...sampling.scratch import rows_at_once
from ...sampling.token_masks import TokenMasks
from ...scheduling.scheduler import Slice
from ..interface import ForwardOutput, engine_memory, weights_in_memory
from ..kv_cache import LayerShape, cache_size, stored_dtype
from ..loading import in_load_thread, load_at_low_priority
from ..multi_step import DecodedTokens, TokenChoice
from . import families
from .adapters import NativeAdapter, pack_adapter
from .kv_blocks import KVBlocks
from .large_pages import KeptRows
from .quantized import BLOCK_OUTPUTS
from .step_rows import StepRows
from .structures import (
    DOUBLE_CODE,
    FLOAT_CODE,
    INT_CODE,
    LONG_CODE,
    POINTER,
    Decoding,
    Project,
    Sample,
    Score,
    Step,
    address_of,
)
from .unsupported import Unsupported
from .weights import WeightPacker

# The kinds of stages whose seconds the kernels measure, in the order of clock.hpp.
STAGES = ("matmul", "attention", "logits", "other")


def unsupported_reason(checkpoint: Checkpoint, dtype: torch.dtype, max_context_tokens: int = 0) -> str:
    """Why the kernels do not support this checkpoint; empty if they do."""
    if dtype not in (torch.float32, torch.bfloat16):
        return "its dtype is neither float32 nor bfloat16"
    try:
        families.write(checkpoint, max_context_tokens=max_context_tokens)
    except Unsupported as error:
        return str(error)
    return ""


class NativeRunner:
    """`library` holds the kernels."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        library: ctypes.CDLL,
        load_progress: LoadProgress | None = None,
    ) -> None:
        checkpoint = Checkpoint(folder)
        self.device, self.dtype, self.vocab_size = device, dtype, checkpoint.vocab_size
        self._library = library
        self.memory = engine_memory(config, device)
        self.memory.reserve_weights(weights_in_memory(checkpoint, config.weights, dtype))
        self._progress = Progress()
        self.stage_seconds: ctypes.Array[ctypes.c_double] | None = None
        prefix = families.prefix_of(checkpoint)
        # Owns the memory that the kernels point to.
        self._packer = WeightPacker(
            folder, prefix, dtype, config.weights, library, load_progress or LoadProgress(), int(config.vocabulary_bits)
        )
        program = in_load_thread(lambda: families.write(checkpoint, self._packer, config.max_context_tokens))
        self._model, self._placements = program.finish(), program.placements.of
        self._packer.close_files()
        trim_heap()
        self._open_cache(checkpoint, config)
        self._logits = KeptRows(self._logit_stride)
        library.open_model.restype = POINTER
        library.open_model.argtypes = [POINTER, *[ctypes.c_int] * 3]
        for function in (library.step_model, library.sample_tokens, library.project_rows, library.score_rows):
            function.argtypes = [POINTER, POINTER]
        library.decode_steps.argtypes = [POINTER] * 3
        library.close_model.argtypes = [POINTER]
        threads = config.threads or len(os.sched_getaffinity(0))
        # Torch applies the logit filters.
        torch.set_num_threads(threads)
        self._handle = library.open_model(
            ctypes.byref(self._model), dtype == torch.bfloat16, config.kv_dtype == INT8, threads
        )

    def _open_cache(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        kv_heads, head_dim = self._model.num_heads // self._model.heads_per_kv, self._model.head_dim
        shapes = [LayerShape(kv_heads, head_dim, head_dim)] * self._model.num_layers
        budget_left = self.memory.measure()
        size = cache_size(shapes, config, checkpoint.context_length, self.dtype, self.device, budget_left)
        self.blocks, self.context_length = self.memory.open_pool(size, grows=True), size.context_length
        self._cache = KVBlocks(shapes, self.blocks, config.block_tokens, stored_dtype(config, self.dtype))

    @property
    def weight_bytes(self) -> int:
        return self._packer.held_bytes

    def watch(self, progress: Progress) -> None:
        # The kernels write to it: it outlives the steps.
        self._progress = progress

    def time_stages(self) -> ctypes.Array[ctypes.c_double]:
        """The seconds that later steps spend, in the order of STAGES; each step adds to them."""
        self.stage_seconds = (ctypes.c_double * len(STAGES))()
        return self.stage_seconds

    def forward(self, plan: Sequence[Slice]) -> ForwardOutput:
        rows = StepRows(plan)
        logits = self._logits.rows(rows.logit_count)
        hidden = torch.empty(rows.hidden_count, self._model.hidden_size)
        max_logits, argmax_ids = torch.empty(rows.logit_count), torch.empty(rows.logit_count, dtype=torch.int64)
        # Before the kernels run: they evict torch's code from the caches.
        output = ForwardOutput(logits[:, : self.vocab_size], hidden, Argmax(max_logits, argmax_ids))
        step = self._step(rows, *(tensor.data_ptr() for tensor in (logits, hidden, max_logits, argmax_ids)))
        self._library.step_model(self._handle, ctypes.byref(step))
        return output

    def _step(self, rows: StepRows, logits: int, *outputs: int | None) -> Step:
        """The kernels' arguments; `outputs` are addresses of hidden states, maxima and their ids."""
        return Step(
            rows.count, rows.logit_count, rows.hidden_count, rows.table_width, self._cache.block_tokens,
            self._logit_stride, rows.adapter_count, *rows.addresses,
            self._cache.address, self._cache.block_bytes, *rows.adapter_addresses, logits, *outputs,
            self._stage_seconds_address, self._progress.address,
        )  # fmt: skip

    def decode(self, plan: Sequence[Slice], choice: TokenChoice, interrupt: Interrupt, seconds: float) -> DecodedTokens:
        rows, count = StepRows(plan), len(plan)
        logits = self._logits.rows(count)
        step = self._step(rows, logits.data_ptr(), None, None, None)
        ids: array[int] = array(LONG_CODE, [0]) * (choice.steps * count)
        max_logits: array[float] = array(FLOAT_CODE, [0.0]) * (choice.steps * count)
        end_ids = array(INT_CODE, [token_id for row in choice.end_ids for token_id in row])
        end_starts = array(INT_CODE, accumulate(map(len, choice.end_ids), initial=0))
        # The kernels choose the likeliest tokens by themselves. What `sample` points to is held until they return.
        sample, _held = None, None
        if not choice.is_greedy:
            sample, _held = self._sample(logits[:, : self.vocab_size], choice.settings, range(count), None)
            sample.uniforms = choice.uniforms.ctypes.data
        decoding = Decoding(
            choice.steps, seconds, interrupt.address, step.ids, step.positions, *map(address_of, (end_ids, end_starts)),
            None if sample is None else ctypes.addressof(sample), address_of(ids), address_of(max_logits),
        )  # fmt: skip
        steps = self._library.decode_steps(self._handle, ctypes.byref(step), ctypes.byref(decoding))
        firsts = range(0, steps * count, count)
        return DecodedTokens(
            [ids[n : n + count].tolist() for n in firsts], [max_logits[n : n + count].tolist() for n in firsts]
        )

    @property
    def _logit_stride(self) -> int:
        """Floats in a row of logits: the kernels write whole blocks of outputs."""
        return self.vocab_size + -self.vocab_size % BLOCK_OUTPUTS

    @property
    def _stage_seconds_address(self) -> int | None:
        return None if self.stage_seconds is None else ctypes.addressof(self.stage_seconds)

    def project(self, computed: ForwardOutput, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        count = rows_at_once(4 * self._logit_stride)
        # One buffer for all batches: the first write to new memory costs page faults.
        logits = torch.empty(min(count, len(rows)), self._logit_stride)
        for start in range(0, len(rows), count):
            hidden_rows = np.asarray(rows[start : start + count], np.int32)
            arguments = Project(
                len(hidden_rows), self._logit_stride, computed.hidden.data_ptr(), hidden_rows.ctypes.data,
                logits.data_ptr(), self._stage_seconds_address, self._progress.address,
            )  # fmt: skip
            self._library.project_rows(self._handle, ctypes.byref(arguments))
            yield logits[: len(hidden_rows), : self.vocab_size]

    def score(self, logits: torch.Tensor, rows: Sequence[int], ids: Ids, alternatives: int) -> Scores:
        count = min(alternatives, logits.shape[1])
        finite, token_logprobs = torch.empty(len(rows), dtype=torch.uint8), torch.empty(len(rows))
        top_ids, top_logprobs = torch.empty(len(rows), count, dtype=torch.int64), torch.empty(len(rows), count)
        row_indices, tokens = np.asarray(rows, np.int32), np.asarray(ids, np.int64)
        results = (finite, token_logprobs, top_ids, top_logprobs)
        arguments = Score(
            len(rows), logits.shape[1], logits.stride(0), count, logits.data_ptr(), row_indices.ctypes.data,
            tokens.ctypes.data, *(tensor.data_ptr() for tensor in results),
        )  # fmt: skip
        self._library.score_rows(self._handle, ctypes.byref(arguments))
        return Scores(*results)

    def sample_tokens(
        self,
        logits: torch.Tensor,
        settings: Sequence[SamplingSettings],
        uniforms: npt.NDArray[np.float64],
        rows: Sequence[int] | None = None,
        masks: TokenMasks | None = None,
    ) -> torch.Tensor:
        ids = torch.empty(len(settings), dtype=torch.int64)
        rows = range(len(settings)) if rows is None else rows
        arguments, _held = self._sample(logits, settings, rows, masks)
        arguments.uniforms, arguments.ids = uniforms.ctypes.data, ids.data_ptr()
        self._library.sample_tokens(self._handle, ctypes.byref(arguments))
        return ids

    def _sample(
        self, logits: torch.Tensor, settings: Sequence[SamplingSettings], rows: Sequence[int], masks: TokenMasks | None
    ) -> tuple[Sample, list[array[Any]]]:
        """The kernels' arguments but for random numbers and results, and the arrays that they point to."""
        # In the order of Sample; the masks lie between the first two.
        arrays: list[array[Any]] = [
            array(INT_CODE, rows),
            array(INT_CODE, masks.index if masks else ()),
            array(DOUBLE_CODE, [row.temperature for row in settings]),
            array(INT_CODE, [row.top_k for row in settings]),
            array(FLOAT_CODE, [1 - row.top_p for row in settings]),
            array(DOUBLE_CODE, [row.min_p for row in settings]),
        ]
        row_indices, *addresses = map(address_of, arrays)
        sample = Sample(
            len(settings), logits.shape[1], logits.stride(0), masks.words.shape[1] if masks else 0,
            logits.data_ptr(), row_indices, masks.words.ctypes.data if masks else None, *addresses,
        )  # fmt: skip
        return sample, arrays

    def load_adapter(self, adapter: LoraAdapter) -> NativeAdapter:
        operations, dtype = self._model.op_count, self.dtype
        return load_at_low_priority(
            lambda: pack_adapter(adapter, self._placements, self._packer.prefix, operations, dtype)
        )

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)

    def close(self) -> None:
        self._library.close_model(self._handle)
        self.memory.close()
