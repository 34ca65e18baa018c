"""The graph runner, for GPUs: Hugging Face's code with decoding steps as CUDA graphs, and asynchronous steps.

It computes prompts as the reference runner does. It knows neither the parameters of requests nor text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tritonlm.contract.load_progress import LoadProgress

from ..config import EngineConfig
from ..scheduling.scheduler import Slice
from . import graphs
from .interface import ForwardOutput
from .reference import MakeModel, ReferenceRunner

_log = logging.getLogger("tritonlm.engine")


class GraphRunner(ReferenceRunner):
    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        device: torch.device | None = None,
        load_progress: LoadProgress | None = None,
        make_model: MakeModel | None = None,
    ) -> None:
        super().__init__(folder, config, device, load_progress, make_model)
        on_gpu = self.device.type == "cuda"
        self._recorder: graphs.Recorder = graphs.CudaRecorder(self.device) if on_gpu else graphs.run_eagerly
        # Gather buffers that recordings use. They must stay when the cache allocates larger ones.
        self._gather_buffers: list[tuple[torch.Tensor, ...]] = []
        # The gather buffer of a step may hold twice the slots of one layer of the cache.
        most_slots = 2 * self.blocks * config.block_tokens
        self.graphs = graphs.GraphCache(
            self._compute, self._record, config.block_tokens, self.context_length, most_slots, self.dtype, self.device
        )
        if on_gpu:
            self.prepare(config.max_sequences)

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
        return self.graphs.run(plan) if self.graphs.supports(plan) else super().forward(plan)

    def can_run_async(self, plan: Sequence[Slice]) -> bool:
        return self.graphs.supports(plan)

    @torch.inference_mode()
    def forward_async(self, plan: Sequence[Slice], ids: torch.Tensor) -> ForwardOutput:
        """A decoding step on tokens, one per row, that exist on the device alone."""
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
