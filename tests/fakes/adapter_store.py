"""A store of adapters over a runner that takes them as they are, for tests of what is loaded and evicted."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine.adapters.loaded import LoadedAdapter
from engine.adapters.lora import LoraAdapter
from engine.adapters.store import Acquired, AdapterStore
from engine.config import EngineConfig
from engine.memory import EngineMemory, MemoryLedger
from tritonlm.contract import TritonLMError
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter

from fakes.peft_folders import PLAIN, tensors, write

# The numbers of one adapter of these tests, in the runner's float32.
BYTES = 4 * sum(tensor.numel() for tensor in tensors().values())
SECONDS = 20


@dataclass(frozen=True)
class Weights:
    adapter: LoraAdapter
    nbytes: int = BYTES


@dataclass
class FakeRunner:
    """Takes an adapter as it is. With `gate` closed, a load waits."""

    dtype: torch.dtype = torch.float32
    loaded: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    # A load has begun.
    begun: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    memory: EngineMemory = field(default_factory=lambda: EngineMemory(MemoryLedger(0), "cpu", lambda: 0))

    def load_adapter(self, adapter: LoraAdapter) -> Weights:
        self.begun.set()
        assert self.gate.wait(SECONDS)
        if self.failure:
            raise self.failure
        self.loaded.append(adapter.name)
        return Weights(adapter)


class Adapters:
    """A store with a file of adapters, whose acquired ones are collected."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.folder, self.file = folder, folder / "lm.json"
        self.runner = FakeRunner()
        self.runner.gate.set()
        config = EngineConfig(adapters_file=str(self.file), **limits)
        self.seconds = 0.0
        self.store = AdapterStore(self.runner, config, lambda: self.seconds)  # type: ignore[arg-type]
        self._acquired: queue.Queue[Acquired] = queue.Queue()

    def write(self, *names: str, value: float = 1.0) -> None:
        for name in names:
            write(self.folder / name, PLAIN, {key: tensor * 0 + value for key, tensor in tensors().items()})
            add_adapter(self.file, name, AdapterEntry(str(self.folder / name)), replace=True)

    def write_large(self) -> None:
        """`large` takes the memory of two others."""
        write(self.folder / "large", {**PLAIN, "r": 8}, tensors(8))
        add_adapter(self.file, "large", AdapterEntry(str(self.folder / "large")))

    def request(self, name: str) -> None:
        self.store.acquire(name, self._acquired.put)

    def next(self) -> Acquired:
        return self._acquired.get(timeout=SECONDS)

    def acquire(self, name: str) -> LoadedAdapter:
        self.request(name)
        acquired = self.next()
        assert isinstance(acquired, LoadedAdapter), acquired
        return acquired

    def refusal(self, name: str) -> TritonLMError:
        self.request(name)
        acquired = self.next()
        assert isinstance(acquired, TritonLMError), acquired
        return acquired

    def use(self, *names: str) -> None:
        for name in names:
            self.store.release(self.acquire(name))

    @property
    def idle(self) -> bool:
        return self._acquired.empty()


Make = Callable[..., Adapters]


@contextlib.contextmanager
def stores(folder: Path) -> Iterator[Make]:
    """Make stores that are closed at the end."""
    made: list[Adapters] = []

    def make(**limits: Any) -> Adapters:
        made.append(Adapters(folder, **limits))
        return made[-1]

    yield make
    for one in made:
        one.store.close()
