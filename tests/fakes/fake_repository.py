"""A Triton that is not there, with several language models and a memory budget: loading takes time and room."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from tritonlm.client.transport import Call, Listed
from tritonlm.client.types import Piece
from tritonlm.contract import ModelNotFound, NoRoom, NotLoaded
from tritonlm.contract.control import RETIRE, STATUS, Command

from .fake_transport import FakeTransport


@dataclass
class FakeModel:
    # What it claims of the budget when it is loaded, and what it has claimed since.
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
        self.found, self.budget, self.load_seconds = models, budget, 0.02
        self.loads_of: Counter[str] = Counter()
        self.unloaded: list[str] = []
        # Which were unloaded while a request ran in them: none may be.
        self.cut_off: list[str] = []
        self.most_taken = 0

    @property
    def taken(self) -> int:
        return sum(model.memory + model.grown for model in self.found.values() if model.loaded)

    def _find(self, model: str) -> None:
        if model not in self.found:
            raise ModelNotFound(f"the model {model!r} does not exist", "model")
        if not self.found[model].loaded or self.found[model].retired:
            raise NotLoaded(f"the model {model!r} is not loaded", "model")

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        # On its way to the engine.
        await asyncio.sleep(0.001)
        self._find(call.model)
        model = self.found[call.model]
        model.running += 1
        try:
            async for piece in super().generate(call):
                yield piece
        finally:
            model.running -= 1
            model.last_used = time.monotonic()

    async def command(self, model: str, command: Command) -> dict[str, Any]:
        found = self.found[model]
        if command.name == RETIRE and found.loaded:
            found.retired = True
        elif not found.loaded:
            raise NotLoaded(f"the model {model!r} is not loaded", "model")
        if command.name not in (RETIRE, STATUS):
            return {"training": {}}
        return {
            "created": 1, "context_length": 512, "device": "cpu", "dtype": "float32", "places": 64,
            "running": found.running, "waiting": 0, "stale": "", "broken": "", "memory_bytes": found.memory - 1,
            "memory_reserved_bytes": 2 * found.memory, "memory_claimed_bytes": found.memory + found.grown,
            "full_context_slots": 2, "memory_budget": self.budget, "idle_unload_seconds": found.idle_unload_seconds,
            "idle_seconds": 0.0 if found.running else time.monotonic() - found.last_used,
        }  # fmt: skip

    async def models(self) -> list[Listed]:
        return [Listed(name, model.loaded) for name, model in self.found.items()]

    async def load(self, model: str, timeout: float) -> None:
        self.loads_of[model] += 1
        found = self.found[model]
        if self.taken + found.memory > self.budget:
            await asyncio.sleep(self.load_seconds)
            raise NoRoom.of(found.memory, self.taken, self.budget)
        # The room is taken before the load is over.
        self.found[model] = FakeModel(found.memory, idle_unload_seconds=found.idle_unload_seconds, loaded=True)
        self.most_taken = max(self.most_taken, self.taken)
        await asyncio.sleep(self.load_seconds)

    async def unload(self, model: str) -> None:
        if self.found[model].running:
            self.cut_off.append(model)
        found = self.found[model]
        self.found[model] = FakeModel(found.memory, idle_unload_seconds=found.idle_unload_seconds)
        self.unloaded.append(model)
