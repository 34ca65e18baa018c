"""Loads a language model at its first request: once, however many ask, and none of them has to ask again.

It knows which calls failed for want of a model and who waits for it. How loading is done the client knows, which models
have to go for it `residence`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import Model, ModelList
from tritonlm.contract import ModelNotFound, NotLoaded, TimedOut, TritonLMError, Unavailable

from .residency import Residence
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
        # Callers by the model that they wait for, or have waited for and are now being served by.
        self._claims: Counter[str] = Counter()
        self._waiting = 0
        self.residence = Residence(client, self._claims)

    def start(self) -> None:
        if self._settings.load_on_demand:
            self.residence.start()

    async def load(self, model: str) -> Model:
        """Load it because somebody says so: anew where its checkpoint has changed."""
        return await self.residence.load(model, time.monotonic() + self._settings.load_seconds)

    async def call(self, model: str, make: Callable[[], Awaitable[T]]) -> T:
        """The result of a call to a model, which is loaded first where that is needed."""
        try:
            return await make()
        except (ModelNotFound, NotLoaded):
            if not self._settings.load_on_demand:
                raise
        deadline = time.monotonic() + self._settings.load_seconds
        patience: float | None = None
        self._claims[model] += 1
        try:
            while True:
                try:
                    await self._loaded(model, deadline)
                except NotLoaded:
                    # Whoever replaces it may take it away once more in the meantime.
                    pass
                except Unavailable:
                    # A Triton has just answered; now none does: that will be mended.
                    patience = patience or time.monotonic() + self._settings.repair_seconds
                    if time.monotonic() > patience or self._waiting >= self._settings.max_loading_requests:
                        raise
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                patience = None
                try:
                    return await make()
                except (ModelNotFound, NotLoaded):
                    if time.monotonic() > deadline:
                        raise
        finally:
            self._claims[model] -= 1
            if not self._claims[model]:
                # Callers may name anything: what nobody waits for leaves no trace.
                del self._claims[model]

    async def revive(self, model: str) -> None:
        """For a call that found its model gone on its way: have it loaded again, if that is ours to do."""
        if self._settings.load_on_demand:
            with contextlib.suppress(TritonLMError):
                await self._loaded(model, time.monotonic() + self._settings.load_seconds)

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
            await self.residence.load(model, deadline)
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
        await self.residence.close()
        for task in list(self._loads.values()):
            task.cancel()
