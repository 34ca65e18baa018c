"""Loads a language model at its first request. Concurrent requests share one load, and each is answered afterwards.

This module knows which calls failed because their model is not loaded, and how many wait for it. The client does the
loading, and `residency` decides which models are unloaded to make room.
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

from ..settings import GatewaySettings
from .residency import ModelResidency

T = TypeVar("T")
# The pause between two attempts while somebody else replaces the model.
_PAUSE_SECONDS = 0.1


class Loader:
    def __init__(self, client: AsyncClient, settings: GatewaySettings) -> None:
        self._client, self._settings = client, settings
        # The running loads, and when they started.
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._started: dict[str, float] = {}
        # Requests by model that wait for it, or run after a wait.
        self._claims: Counter[str] = Counter()
        self._waiting = 0
        self.residency = ModelResidency(client, self._claims)

    def start(self) -> None:
        if self._settings.load_on_demand:
            self.residency.start()

    async def load(self, model: str) -> Model:
        """Load a model on an explicit request; a loaded one is replaced if its checkpoint has changed."""
        return await self.residency.load(
            self._client.names.resolve(model).lm, time.monotonic() + self._settings.load_seconds
        )

    async def call(self, model: str, make_call: Callable[[], Awaitable[T]]) -> T:
        """Run a call, loading its model first if needed. An adapter is loaded by its model's engine."""
        model = self._client.names.resolve(model).lm
        try:
            return await make_call()
        except (ModelNotFound, NotLoaded):
            if not self._settings.load_on_demand:
                raise
        self._claims[model] += 1
        try:
            return await self._load_and_call(model, make_call, time.monotonic() + self._settings.load_seconds)
        finally:
            self._claims[model] -= 1
            if not self._claims[model]:
                # Model names come from callers, so unused entries must not accumulate.
                del self._claims[model]

    async def _load_and_call(self, model: str, make_call: Callable[[], Awaitable[T]], deadline: float) -> T:
        repair_deadline: float | None = None
        while True:
            try:
                await self._wait_until_loaded(model, deadline)
            except NotLoaded:
                # Somebody else who replaces the model may have unloaded it again.
                pass
            except Unavailable:
                # Triton answered before and does not now: it will be repaired.
                repair_deadline = repair_deadline or time.monotonic() + self._settings.repair_seconds
                if time.monotonic() > repair_deadline or self._waiting >= self._settings.max_loading_requests:
                    raise
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            repair_deadline = None
            try:
                return await make_call()
            except (ModelNotFound, NotLoaded):
                if time.monotonic() > deadline:
                    raise

    async def revive(self, model: str) -> None:
        """Load a model again that a running call found missing, if loading on demand is enabled."""
        if self._settings.load_on_demand:
            with contextlib.suppress(TritonLMError):
                await self._wait_until_loaded(model, time.monotonic() + self._settings.load_seconds)

    async def _wait_until_loaded(self, model: str, deadline: float) -> None:
        """Join the model's running load, or start one."""
        if self._waiting >= self._settings.max_loading_requests:
            raise Unavailable(f"{model!r} is being loaded, and {self._waiting} requests already wait for it", "model")
        self._waiting += 1
        try:
            if model not in self._loads:
                self._started[model] = time.monotonic()
                task = self._loads[model] = asyncio.get_running_loop().create_task(self._load(model, deadline))
                task.add_done_callback(lambda _: self._forget(model))
            # Shielded: a request that stops waiting must not cancel the load for the others.
            await asyncio.wait_for(asyncio.shield(self._loads[model]), max(deadline - time.monotonic(), 0.0))
        except (TimeoutError, asyncio.TimeoutError):
            raise TimedOut(f"{model!r} was not loaded in {self._settings.load_seconds:g} s") from None
        finally:
            self._waiting -= 1

    async def _load(self, model: str, deadline: float) -> None:
        if (await self._client.models.retrieve(model)).state == "unavailable":
            await self.residency.load(model, deadline)
        else:
            # Somebody else is replacing it, or has just done so.
            await asyncio.sleep(_PAUSE_SECONDS)

    def _forget(self, model: str) -> None:
        task = self._loads.pop(model)
        self._started.pop(model)
        if not task.cancelled():
            # Mark the exception as retrieved: the waiting requests got it, or none is left.
            task.exception()

    def with_loading_states(self, models: ModelList) -> ModelList:
        """The list, with the models that are being loaded in the state `loading`."""
        return ModelList(data=[self.with_loading_state(model) for model in models.data])

    def with_loading_state(self, model: Model) -> Model:
        # An adapter waits for its language model.
        started = self._started.get(model.parent or model.id)
        if started is None or model.state == "ready":
            return model
        seconds = time.monotonic() - started
        return model.model_copy(update={"state": "loading", "reason": f"loading for {seconds:.0f} s"})

    async def close(self) -> None:
        await self.residency.close()
        for task in list(self._loads.values()):
            task.cancel()
