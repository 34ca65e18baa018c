"""Hugging Face's code with recorded decoding steps, for GPUs; and steps on tokens that nobody has seen yet.

Prompts go the way of the reference. It knows neither requests' parameters nor text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import EngineConfig
from ..scheduling.scheduler import Slice
from . import graphs
from .interface import Computed
from .reference import ReferenceRunner

_log = logging.getLogger("tritonlm.engine")


class GraphRunner(ReferenceRunner):
    def __init__(self, folder: Path, config: EngineConfig, device: torch.device | None = None) -> None:
        super().__init__(folder, config, device)
        on_gpu = self.device.type == "cuda"
        self._recorder: graphs.Record = graphs.CudaRecorder(self.device) if on_gpu else graphs.again
        # Recordings point into it, also when the cache has taken larger ones since.
        self._kept: list[tuple[torch.Tensor, ...]] = []
        # A step may read through memory for twice what the cache holds of one layer.
        most_slots = 2 * self.blocks * config.block_tokens
        self.graphs = graphs.Graphs(
            self._compute, self._record, config.block_tokens, self.context_length, most_slots, self.dtype, self.device
        )
        if on_gpu:
            self.prepare(config.max_sequences)

    @torch.inference_mode()
    def prepare(self, most_rows: int) -> None:
        """Record what later steps will want; the first requests would wait for it."""
        began = time.perf_counter()
        self.graphs.prepare(most_rows)
        _log.info("recorded %d shapes of steps in %.1f s", len(self.graphs.recordings), time.perf_counter() - began)

    @torch.inference_mode()
    def forward(self, plan: Sequence[Slice]) -> Computed:
        return self.graphs.run(plan) if self.graphs.suits(plan) else super().forward(plan)

    def goes_ahead(self, plan: Sequence[Slice]) -> bool:
        return self.graphs.suits(plan)

    @torch.inference_mode()
    def forward_after(self, plan: Sequence[Slice], ids: torch.Tensor) -> Computed:
        """A decoding step whose tokens, a row each, are known on the device alone."""
        return self.graphs.run(plan, ids)

    def _record(self, compute: graphs.Compute) -> graphs.Compute:
        try:
            recorded = self._recorder(compute)
        except RuntimeError as error:
            # Code that asks the device something in the middle of a step cannot be recorded.
            _log.warning("this model's steps cannot be recorded, and are computed one by one: %s", error)
            self._recorder = graphs.again
            return compute
        self._kept.append(self._cache.gathered)
        return recorded
