"""A fake Triton with several language models and a memory budget: a load takes time and memory."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from tritonlm.client.transport import Call, RepositoryModel
from tritonlm.client.types import Piece
from tritonlm.contract import ModelNotFound, NoRoom, NotLoaded
from tritonlm.contract.control import RETIRE, STATUS, Command

from .fake_transport import FakeTransport


@dataclass
class FakeModel:
    # The memory that it reserves when it is loaded, and what it has reserved since.
    memory: int
    grown: int = 0
    idle_unload_seconds: float = 0.0
    loaded: bool = False
    running: int = 0
    retired: bool = False
    last_used: float = field(default_factory=time.monotonic)


class FakeRepository(FakeTransport):
    def __init__(self, models: dict[str, FakeModel], budget: int) -> None:
        super().__init__(pause=0.002)
        self.repository, self.budget, self.load_seconds = models, budget, 0.02
        self.loads_of: Counter[str] = Counter()
        self.unloaded: list[str] = []
        # Models that were unloaded while a request ran. There must be none.
        self.interrupted: list[str] = []
        self.most_taken = 0

    @property
    def taken(self) -> int:
        return sum(model.memory + model.grown for model in self.repository.values() if model.loaded)

    def _find(self, model: str) -> None:
        if model not in self.repository:
            raise ModelNotFound(f"the model {model!r} does not exist", "model")
        if not self.repository[model].loaded or self.repository[model].retired:
            raise NotLoaded(f"the model {model!r} is not loaded", "model")

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        # The time until the request reaches the engine.
        await asyncio.sleep(0.001)
        self._find(call.model)
        model = self.repository[call.model]
        model.running += 1
        try:
            async for piece in super().generate(call):
                yield piece
        finally:
            model.running -= 1
            model.last_used = time.monotonic()

    async def command(self, model: str, command: Command) -> dict[str, Any]:
        entry = self.repository[model]
        if command.name == RETIRE and entry.loaded:
            entry.retired = True
        elif not entry.loaded:
            raise NotLoaded(f"the model {model!r} is not loaded", "model")
        if command.name not in (RETIRE, STATUS):
            return {"training": {}}
        return {
            "created": 1, "context_length": 512, "device": "cpu", "dtype": "float32", "slots": 64, "places": 64,
            "running": entry.running, "waiting": 0, "stale": "", "broken": "", "memory_bytes": entry.memory - 1,
            "memory_reserved_bytes": 2 * entry.memory, "memory_claimed_bytes": entry.memory + entry.grown,
            "full_context_slots": 2, "memory_budget": self.budget, "idle_unload_seconds": entry.idle_unload_seconds,
            "idle_seconds": 0.0 if entry.running else time.monotonic() - entry.last_used,
        }  # fmt: skip

    async def models(self) -> list[RepositoryModel]:
        return [RepositoryModel(name, model.loaded) for name, model in self.repository.items()]

    async def load(self, model: str, timeout: float) -> None:
        self.loads_of[model] += 1
        entry = self.repository[model]
        if self.taken + entry.memory > self.budget:
            await asyncio.sleep(self.load_seconds)
            raise NoRoom.for_sizes(entry.memory, self.taken, self.budget)
        # The memory is taken before the load is complete.
        self.repository[model] = FakeModel(entry.memory, idle_unload_seconds=entry.idle_unload_seconds, loaded=True)
        self.most_taken = max(self.most_taken, self.taken)
        await asyncio.sleep(self.load_seconds)

    async def unload(self, model: str) -> None:
        if self.repository[model].running:
            self.interrupted.append(model)
        entry = self.repository[model]
        self.repository[model] = FakeModel(entry.memory, idle_unload_seconds=entry.idle_unload_seconds)
        self.unloaded.append(model)
