"""The interface of a model runner: a plan of slices in, logits out. Also the choice of device and dtype.

It knows neither how a step is computed, nor the parameters of requests, nor text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from tritonlm.contract import Checkpoint, CheckpointError, devices

from ..adapters.loaded import AdapterWeights
from ..adapters.lora import LoraAdapter
from ..config import AUTO, INT4, INT8, EngineConfig
from ..memory import EngineMemory, MemoryLedger, resident_memory
from ..monitoring.progress import Progress
from ..sampling.logit_filters import SamplingSettings
from ..sampling.logprobs import Ids, Scores
from ..sampling.sampler import Argmax
from ..sampling.token_masks import TokenMasks
from ..scheduling.scheduler import Slice
from .flat_batch import FlatBatch

# Of the bytes of quantized weights in a file, those in the kernels' layout; of int8 weights, int4 ones with scales.
_REPACKED, _INT4_SHARE = 1.2, 0.7
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ForwardOutput:
    """The output rows of the slices, in the plan's order. They must be read before the next step."""

    # The rows that tokens are sampled from.
    logits: torch.Tensor
    # The last hidden states of prompts that are embedded or scored.
    hidden: torch.Tensor
    # The argmax of each row of logits, if the runner has computed it already.
    argmax: Argmax | None = None
    # The input of the step, if the runner must compute it again to project hidden states.
    batch: FlatBatch | None = None

    def first(self, count: int) -> ForwardOutput:
        """The first rows of logits, for a plan without hidden rows."""
        argmax = self.argmax and Argmax(self.argmax.values[:count], self.argmax.ids[:count])
        return ForwardOutput(self.logits[:count], self.hidden, argmax)


class Runner(Protocol):
    """Computes the steps of one engine."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    blocks: int
    context_length: int
    # The memory of weights, KV cache and, on a CPU, the process.
    memory: EngineMemory

    def forward(self, plan: Sequence[Slice]) -> ForwardOutput: ...

    def project(self, computed: ForwardOutput, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        """The logits of these hidden rows. They must be read before the next step.

        It yields groups of rows that fit into the scratch memory. A group is valid until the next one is requested.
        """
        ...

    def sample_tokens(
        self,
        logits: torch.Tensor,
        settings: Sequence[SamplingSettings],
        uniforms: npt.NDArray[np.float64],
        rows: Sequence[int] | None = None,
        masks: TokenMasks | None = None,
    ) -> torch.Tensor: ...

    def score(self, logits: torch.Tensor, rows: Sequence[int], ids: Ids, alternatives: int) -> Scores: ...

    def clear(self, blocks: Sequence[int]) -> None: ...

    def load_adapter(self, adapter: LoraAdapter) -> AdapterWeights:
        """The adapter in this runner's layout, or CheckpointError that names a layer which it cannot be applied to.

        It is called on another thread while steps run. `forward` applies the weights of `request.adapter`. Their memory
        is released with the last reference.
        """
        ...

    def watch(self, progress: Progress) -> None:
        """Advance this counter during the computation."""
        ...

    def close(self) -> None: ...


def choose_devices(setting: str) -> list[torch.device]:
    """The devices of the setting, with one engine each; `auto` is every GPU, or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == devices.AUTO:
        setting = devices.CUDA if count else devices.CPU
    names = [f"{devices.CUDA}:{n}" for n in range(count)] if setting == devices.CUDA else setting.split(",")
    for name in names or [devices.CUDA]:
        if name.startswith(devices.CUDA) and int(name.rpartition(":")[2] if ":" in name else 0) >= count:
            raise CheckpointError(f"device {name} is configured, but torch finds {count} CUDA devices; use auto or cpu")
    return [torch.device(name) for name in names]


def choose_dtype(setting: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own dtype, except for half-precision types that this CPU computes slowly."""
    if setting != "auto":
        return _DTYPES[setting]
    dtype = own_dtype(checkpoint)
    if device.type == "cpu" and dtype != torch.float32:
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return dtype


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of config.json."""
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    return _DTYPES.get(str(own), torch.float32)


def used_memory(device: torch.device) -> int:
    """The bytes of this process on the device: on a GPU those reserved by torch, on a CPU the resident memory."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_memory()


def engine_memory(config: EngineConfig, device: torch.device) -> EngineMemory:
    return EngineMemory(MemoryLedger(config.memory_budget), str(device), lambda: used_memory(device))


def weights_in_memory(checkpoint: Checkpoint, weights: str, dtype: torch.dtype) -> int:
    """How many bytes the kernels' weights take at most."""
    if weights == AUTO and (stored := checkpoint.quantized_bytes()):
        return round(stored * _REPACKED)
    on_disk = weights_on_disk(checkpoint, torch.int8 if weights in (INT4, INT8) else dtype)
    return round(on_disk * _INT4_SHARE) if weights == INT4 else on_disk


def weights_on_disk(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many bytes the weights of a checkpoint's files take in this number type."""
    if count := checkpoint.quantized_count():
        return count * dtype.itemsize
    return checkpoint.weight_bytes() * dtype.itemsize // own_dtype(checkpoint).itemsize
