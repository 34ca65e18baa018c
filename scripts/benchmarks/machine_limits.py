"""The limits of this machine: bytes read and matmul operations per second, as torch reaches them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from processor import kind


@dataclass(frozen=True)
class Limits:
    """This machine's limits, measured during the benchmark: bytes read and matmul operations per second."""

    read: float
    matmul: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: str = "cpu") -> Limits:
        """A GPU reaches its limits only with larger sizes."""
        on_gpu = device != "cpu"
        if not on_gpu and dtype == torch.bfloat16 and not kind().multiplies_bfloat16:
            dtype = torch.float32
        memory = torch.ones(2**32 if on_gpu else 2**28, dtype=torch.uint8, device=device)
        numbers = memory.view(torch.int64)
        read = _best_of(lambda: finished(numbers.sum(), device))
        size = 8192 if on_gpu else 2048
        left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        return cls(memory.nbytes / read, 2 * size**3 / _best_of(lambda: finished(left @ right, device)))

    def between(self, other: Limits) -> Limits:
        """The mean: a shared machine's speed changes during a measurement."""
        return Limits((self.read + other.read) / 2, (self.matmul + other.matmul) / 2)


def finished(result: object, device: str) -> object:
    """Wait for the GPU, which computes asynchronously."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return result


def _best_of(work: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
