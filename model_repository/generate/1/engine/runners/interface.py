"""What the engine needs of a runner: a plan of slices in, logits out; and what every runner settles before it loads.

It knows neither how a step is computed nor requests' parameters nor text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract import Checkpoint, CheckpointError, devices

from ..config import EngineConfig
from ..memory import EngineMemory, MemoryBook, resident_memory
from ..monitoring.progress import Progress
from ..sampling.logit_filters import DrawSettings
from ..sampling.logprobs import Scores
from ..sampling.sampler import Best
from ..scheduling.scheduler import Slice
from .flat_batch import FlatBatch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Computed:
    """The rows that each slice wants, in the plan's order."""

    # Those that tokens are sampled from.
    logits: torch.Tensor
    # The last hidden states of prompts that are embedded or scored.
    hidden: torch.Tensor
    # Each row of logits' likeliest token, where the runner has looked already.
    best: Best | None = None
    # What it was computed from, where the runner has to compute it again to project hidden states.
    batch: FlatBatch | None = None

    def first(self, count: int) -> Computed:
        """So many rows of logits, of a plan that wants no hidden states."""
        best = self.best and Best(self.best.values[:count], self.best.ids[:count])
        return Computed(self.logits[:count], self.hidden, best)


class Runner(Protocol):
    """What the engine needs of a runner."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    blocks: int
    context_length: int
    # Weights, cache and, on a CPU, the process around them.
    memory: EngineMemory

    def forward(self, plan: Sequence[Slice]) -> Computed: ...

    def project(self, computed: Computed, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        """The logits of these rows of its hidden states, before the next step is computed.

        They come as many rows at a time as fit into the scratch; each part is good until the next one is asked for.
        """
        ...

    def draw(
        self,
        logits: torch.Tensor,
        settings: Sequence[DrawSettings],
        uniforms: npt.NDArray[np.float64],
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor: ...

    def score(self, logits: torch.Tensor, rows: Sequence[int], ids: Sequence[int], alternatives: int) -> Scores: ...

    def clear(self, blocks: Sequence[int]) -> None: ...

    def watch(self, progress: Progress) -> None:
        """Advance this counter while computing."""
        ...

    def close(self) -> None: ...


def choose_devices(wanted: str) -> list[torch.device]:
    """One for each engine: those that are named, or every GPU there is."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == devices.AUTO:
        wanted = devices.CUDA if count else devices.CPU
    names = [f"{devices.CUDA}:{n}" for n in range(count)] if wanted == devices.CUDA else wanted.split(",")
    for name in names or [devices.CUDA]:
        if name.startswith(devices.CUDA) and int(name.rpartition(":")[2] if ":" in name else 0) >= count:
            raise CheckpointError(f"device {name} was asked for, but torch finds {count} CUDA devices; use auto or cpu")
    return [torch.device(name) for name in names]


def choose_dtype(wanted: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own type, except for half-precision types that a CPU computes slowly."""
    if wanted != "auto":
        return _DTYPES[wanted]
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    dtype = _DTYPES.get(str(own), torch.float32)
    if device.type == "cpu" and dtype != torch.float32:
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return dtype


def taken_memory(device: torch.device) -> int:
    """Bytes of this process on the device: on a GPU what torch has there, else all that lies in memory."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_memory()


def engine_memory(config: EngineConfig, device: torch.device) -> EngineMemory:
    return EngineMemory(MemoryBook(config.memory_budget), str(device), lambda: taken_memory(device))


def weights_on_disk(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many bytes the weights of a checkpoint's files take in this number type."""
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    size = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    return size * dtype.itemsize // _DTYPES.get(str(own), torch.float32).itemsize
