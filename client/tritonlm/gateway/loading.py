"""Loads a language model at its first request: once, however many ask, and none of them has to ask again.

It knows which calls failed for want of a model and who waits for it; what loading is the client knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tritonlm.client import AsyncClient
from tritonlm.contract import ModelNotFound, NotLoaded, TimedOut, Unavailable
from tritonlm.types import Model, ModelList

from .settings import GatewaySettings

T = TypeVar("T")
# Between two tries while somebody else replaces the model.
_PAUSE_SECONDS = 0.1


class Loader:
    def __init__(self, client: AsyncClient, settings: GatewaySettings) -> None:
        self._client, self._settings = client, settings
        # Loads that are under way, and since when.
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._since: dict[str, float] = {}
        self._waiting = 0

    async def call(self, model: str, make: Callable[[], Awaitable[T]]) -> T:
        """The result of a call to a model, which is loaded first where that is needed."""
        deadline = time.monotonic() + self._settings.load_seconds
        while True:
            try:
                return await make()
            except (ModelNotFound, NotLoaded):
                if not self._settings.load_on_demand or time.monotonic() > deadline:
                    raise
            # Whoever replaces it may take it away once more in the meantime.
            with contextlib.suppress(NotLoaded):
                await self._loaded(model, deadline)

    async def _loaded(self, model: str, deadline: float) -> None:
        """Wait in the line of those who want this model."""
        if self._waiting >= self._settings.max_loading_requests:
            raise Unavailable(f"{model!r} is being loaded, and {self._waiting} requests wait already", "model")
        self._waiting += 1
        try:
            if model not in self._loads:
                self._since[model] = time.monotonic()
                task = self._loads[model] = asyncio.get_running_loop().create_task(self._load(model, deadline))
                task.add_done_callback(lambda _: self._forget(model))
            # Shielded: who leaves the line does not end the load of the others.
            await asyncio.wait_for(asyncio.shield(self._loads[model]), max(deadline - time.monotonic(), 0.0))
        except (TimeoutError, asyncio.TimeoutError):
            raise TimedOut(f"{model!r} was not loaded in {self._settings.load_seconds:g} s") from None
        finally:
            self._waiting -= 1

    async def _load(self, model: str, deadline: float) -> None:
        found = await self._client.models.retrieve(model)
        if found.state == "unavailable":
            await self._client.models.load(model, max(deadline - time.monotonic(), 1.0))
        else:
            # Somebody else replaces it, or has just done so.
            await asyncio.sleep(_PAUSE_SECONDS)

    def _forget(self, model: str) -> None:
        task = self._loads.pop(model)
        self._since.pop(model)
        if not task.cancelled():
            # Those who waited have been told; where all of them left, nobody asks.
            task.exception()

    def seen(self, models: ModelList) -> ModelList:
        """The list with what is loading now told as such."""
        return ModelList(data=[self.state_of(model) for model in models.data])

    def state_of(self, model: Model) -> Model:
        if model.id not in self._since or model.state == "ready":
            return model
        seconds = time.monotonic() - self._since[model.id]
        return model.model_copy(update={"state": "loading", "reason": f"loading for {seconds:.0f} s"})

    async def close(self) -> None:
        for task in list(self._loads.values()):
            task.cancel()
