"""The graph runner, for GPUs: Hugging Face's code with steps as CUDA graphs, and asynchronous steps.

It computes other steps as the reference runner does. It knows neither the parameters of requests nor text.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tritonlm.contract import CheckpointError
from tritonlm.contract.load_progress import LoadProgress

from ..config import FP8, INT4, QUANTIZED, EngineConfig
from ..scheduling.scheduler import Slice
from . import graphs, prompt_graphs
from .gpu import block_attention, quantized_linear, query_tiles, rotary, self_check
from .interface import ForwardOutput, choose_devices
from .kv_cache import KVCache, free_memory, stored_dtype
from .low_rank import wants_adapters
from .reference import MakeModel, ReferenceRunner

_log = logging.getLogger("tritonlm.engine")
# Of a KV cache in which steps of padding are measured.
_LEAST_BLOCKS = 2


class GraphRunner(ReferenceRunner):
    _fuses = True

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        device: torch.device | None = None,
        load_progress: LoadProgress | None = None,
        make_model: MakeModel | None = None,
    ) -> None:
        device = device or choose_devices(config.device)[0]
        _refuse_weights(config, device)
        super().__init__(folder, config, device, load_progress, make_model)
        self._recorder = self._new_recorder()
        # Gather buffers that recordings use. They must stay when the cache allocates larger ones.
        self._gather_buffers: list[tuple[torch.Tensor, ...]] = []
        self.graphs, self.prompt_graphs = self._new_graphs(config, self.context_length, self.blocks, self._record)
        if self.device.type == "cuda":
            self.prepare(config.max_sequences)

    def _new_recorder(self) -> graphs.Recorder:
        return graphs.CudaRecorder(self.device) if self.device.type == "cuda" else graphs.run_eagerly

    def _new_graphs(
        self, config: EngineConfig, context: int, blocks: int, record: graphs.Recorder
    ) -> tuple[graphs.GraphCache, prompt_graphs.PromptGraphs | None]:
        """Those of decoding steps, and those of steps with prompts, where attention reads the blocks in place."""
        # The gather buffer of a step may hold twice the slots of one layer of the cache.
        most_slots = 2 * blocks * config.block_tokens
        tokens = config.block_tokens
        decoding = graphs.GraphCache(
            self._compute, record, tokens, context, most_slots, self.dtype, self.device, in_place=self.in_place
        )
        if not self.in_place:
            return decoding, None
        shape = prompt_graphs.PromptShape(
            config.prefill_tokens + config.max_sequences, config.max_sequences, -(-context // tokens), self._tile_rows
        )
        return decoding, prompt_graphs.PromptGraphs(self._compute, record, shape, tokens, self.device)

    def _prepare_steps(self, config: EngineConfig, context: int) -> int:
        """Choose the attention, and measure what recordings take, on a cache of two blocks that is freed again."""
        self._tile_rows = self._check_kernels(config)
        count = rotary.settle(self._model, defers=self.in_place)
        _log.info("%d layers rotate queries and keys as they write them", count)
        return self._measure_recordings(config, context) if self.device.type == "cuda" else 0

    def _measure_recordings(self, config: EngineConfig, context: int) -> int:
        torch.cuda.empty_cache()
        stored = stored_dtype(config, self.dtype)
        self._cache = KVCache(self._layers, _LEAST_BLOCKS, config.block_tokens, self.dtype, self.device, stored)
        try:
            size = self._measured(config, min(context, config.max_context_tokens or context))
        except RuntimeError as error:
            _log.warning("what recorded steps take is unknown, because they cannot be recorded: %s", error)
            return 0
        finally:
            del self._cache
            # Recordings and what they compute refer to each other.
            gc.collect()
            torch.cuda.empty_cache()
        _log.info("recorded steps take about %d MiB", size >> 20)
        return size

    @torch.inference_mode()
    def _measured(self, config: EngineConfig, context: int) -> int:
        decoding, prompts = self._new_graphs(config, context, _LEAST_BLOCKS, self._new_recorder())
        record = _recordings(decoding, prompts, config.max_sequences)
        return graphs.measure(record, lambda: -free_memory(self.device))

    def _quantize(self, config: EngineConfig) -> None:
        if config.weights not in QUANTIZED:
            return
        bits = 4 if config.weights == INT4 else 8
        head_bits = int(config.vocabulary_bits) if config.weights == INT4 else 8
        before, after = quantized_linear.quantize(self._model, bits, head_bits, floats=config.weights == FP8)
        _log.info("the linear layers take %d MiB in place of %d", after >> 20, before >> 20)

    @property
    def in_place(self) -> bool:
        """Whether attention reads the blocks where they lie."""
        return self._tile_rows > 0

    @torch.inference_mode()
    def _check_kernels(self, config: EngineConfig) -> int:
        """The rows of a tile, if the kernels compute this model's attention here; else 0."""
        if not block_attention.is_possible(self.device) or stored_dtype(config, self.dtype) != self.dtype:
            return 0
        shape = self._model.config.get_text_config()
        try:
            self_check.check(self._layers, shape, config.block_tokens, self.dtype, self.device)
        except Exception as error:  # the compiler of triton-lang may raise anything
            _log.warning("attention gathers its blocks, because the kernels fail here: %s", error)
            return 0
        repeats = shape.num_attention_heads // min(layer.heads for layer in self._layers)
        return query_tiles.tile_rows(repeats, self.dtype)

    @torch.inference_mode()
    def prepare(self, most_rows: int) -> None:
        """Record all shapes at load, so that the first requests do not wait for it."""
        began = time.perf_counter()
        record = _recordings(self.graphs, self.prompt_graphs, most_rows)
        for compute in record:
            compute()
        _log.info("recorded %d step shapes as CUDA graphs in %.1f s", len(record), time.perf_counter() - began)

    def forward(self, plan: Sequence[Slice]) -> ForwardOutput:
        computed = self._forward(plan)
        # Nothing reads the output of such a step. Without a wait the host would launch a whole prompt at once: no step
        # would have a measured time, and nothing could come between them.
        if self.device.type == "cuda" and not any(piece.samples for piece in plan):
            torch.cuda.current_stream(self.device).synchronize()
        return computed

    @torch.inference_mode()
    def _forward(self, plan: Sequence[Slice]) -> ForwardOutput:
        # Recordings hold the base alone.
        if wants_adapters(plan):
            return super().forward(plan)
        self._select_adapters(plan)
        # These recordings compute a row of logits for each slice, also for one that ends within a prompt.
        if self.graphs.supports(plan) and all(piece.samples for piece in plan):
            return self.graphs.run(plan)
        if self.prompt_graphs and self.prompt_graphs.supports(plan):
            return self.prompt_graphs.run(plan)
        return super().forward(plan)

    def can_run_async(self, plan: Sequence[Slice]) -> bool:
        return self.graphs.supports(plan) and not wants_adapters(plan)

    @torch.inference_mode()
    def forward_async(self, plan: Sequence[Slice], ids: torch.Tensor) -> ForwardOutput:
        """A decoding step on tokens, one per row, that exist on the device alone."""
        self._select_adapters(plan)
        return self.graphs.run(plan, ids)

    def _record(self, compute: graphs.Compute) -> graphs.Compute:
        try:
            recorded = self._recorder(compute)
        except RuntimeError as error:
            # Code that synchronizes with the device within a step cannot be recorded.
            _log.warning("this model's steps cannot be recorded as CUDA graphs and run without them: %s", error)
            self._recorder = graphs.run_eagerly
            return compute
        self._gather_buffers.append(self._cache.gathered)
        return recorded


def _recordings(
    decoding: graphs.GraphCache, prompts: prompt_graphs.PromptGraphs | None, most_rows: int
) -> list[Callable[[], object]]:
    """What records each shape, the largest first."""
    of_prompts = [partial(prompts.recording, tokens) for tokens in prompts.shapes()] if prompts else []
    return [*of_prompts, *(partial(decoding.recording, shape) for shape in decoding.shapes(most_rows))]


def _refuse_weights(config: EngineConfig, device: torch.device) -> None:
    """Raise CheckpointError for quantized weights that this device cannot multiply."""
    if config.weights not in QUANTIZED:
        return
    if not block_attention.is_possible(device):
        raise CheckpointError(f"weights {config.weights} on a GPU need triton-lang: install the package triton")
    if config.weights == FP8 and not quantized_linear.has_floats(device):
        raise CheckpointError(
            f"weights fp8 need a GPU of compute capability 8.9 or later, and {device} has less; use weights int8"
        )
