"""The graph runner, for GPUs: Hugging Face's code with decoding steps as CUDA graphs, and asynchronous steps.

It computes prompts as the reference runner does. It knows neither the parameters of requests nor text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tritonlm.contract import CheckpointError
from tritonlm.contract.load_progress import LoadProgress

from ..config import FP8, INT4, QUANTIZED, EngineConfig
from ..scheduling.scheduler import Slice
from . import graphs
from .gpu import block_attention, quantized_linear, query_tiles, rotary, self_check
from .interface import ForwardOutput, choose_devices
from .low_rank import wants_adapters
from .reference import MakeModel, ReferenceRunner

_log = logging.getLogger("tritonlm.engine")


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
        on_gpu = self.device.type == "cuda"
        self._tile_rows = self._check_kernels()
        count = rotary.settle(self._model, defers=self.in_place)
        _log.info("%d layers rotate queries and keys as they write them", count)
        self._recorder: graphs.Recorder = graphs.CudaRecorder(self.device) if on_gpu else graphs.run_eagerly
        # Gather buffers that recordings use. They must stay when the cache allocates larger ones.
        self._gather_buffers: list[tuple[torch.Tensor, ...]] = []
        # The gather buffer of a step may hold twice the slots of one layer of the cache.
        most_slots = 2 * self.blocks * config.block_tokens
        self.graphs = graphs.GraphCache(
            self._compute, self._record, config.block_tokens, self.context_length, most_slots, self.dtype, self.device,
            in_place=self.in_place,
        )  # fmt: skip
        if on_gpu:
            self.prepare(config.max_sequences)

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
    def _check_kernels(self) -> int:
        """The rows of a tile, if the kernels compute this model's attention here; else 0."""
        if not block_attention.is_possible(self.device) or self._cache.keys[0].dtype != self.dtype:
            return 0
        config = self._model.config.get_text_config()
        try:
            self_check.check(self._layers, config, self._cache.block_tokens, self.dtype, self.device)
        except Exception as error:  # the compiler of triton-lang may raise anything
            _log.warning("attention gathers its blocks, because the kernels fail here: %s", error)
            return 0
        repeats = config.num_attention_heads // min(layer.heads for layer in self._layers)
        return query_tiles.tile_rows(repeats, self.dtype)

    @torch.inference_mode()
    def prepare(self, most_rows: int) -> None:
        """Record all shapes at load, so that the first requests do not wait for it."""
        began = time.perf_counter()
        self.graphs.prepare(most_rows)
        _log.info(
            "recorded %d step shapes as CUDA graphs in %.1f s", len(self.graphs.recordings), time.perf_counter() - began
        )

    @torch.inference_mode()
    def forward(self, plan: Sequence[Slice]) -> ForwardOutput:
        if not self._has_recording(plan):
            return super().forward(plan)
        self._select_adapters(plan)
        return self.graphs.run(plan)

    def can_run_async(self, plan: Sequence[Slice]) -> bool:
        return self._has_recording(plan)

    def _has_recording(self, plan: Sequence[Slice]) -> bool:
        """Recordings hold the base alone."""
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
