"""Model residency: which language models stay loaded. Idle models are unloaded, and the least recently used make room.

The engines refuse to load beyond the memory budget, and report their memory and idle time. A model is unloaded only
after its running requests, and those that waited for it, have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import Model
from tritonlm.contract import ModelNotFound, NoRoom, TritonLMError

from .. import metrics

_log = logging.getLogger("tritonlm.gateway")
_PAUSE_SECONDS = 0.05
# Idle models are checked at this fraction of the shortest idle limit, within these bounds in seconds.
_CHECK_FRACTION, _MIN_CHECK_SECONDS, _MAX_CHECK_SECONDS = 0.25, 0.1, 15.0


class ModelResidency:
    def __init__(self, client: AsyncClient, claims: Mapping[str, int]) -> None:
        """`claims`: the number of requests by model that wait for it, or run after a wait."""
        self._client, self._claims = client, claims
        # With a memory budget only one model loads at a time, so that two loads do not unload each other's models.
        self._load_lock = asyncio.Lock()
        # The last description of each model while it was loaded, and its smallest claim on the budget: an engine's
        # claim grows, and the model needs only this much when it is loaded again.
        self._last_seen: dict[str, Model] = {}
        self._needs: dict[str, int] = {}
        self._check_now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def load(self, model: str, deadline: float) -> Model:
        """Load it, unloading others if necessary."""
        try:
            if not any(known.memory_budget for known in [*await self._ready(), *self._last_seen.values()]):
                with contextlib.suppress(NoRoom):
                    return await self._load(model, deadline)
            async with self._load_lock:
                return await self._make_room_and_load(model, deadline)
        except NoRoom as error:
            # Replaces the param, which held the missing bytes.
            raise NoRoom(f"{model!r} cannot be loaded now: {error.message}", "model") from None

    async def _make_room_and_load(self, model: str, deadline: float) -> Model:
        missing = self._missing(model, await self._ready())
        while True:
            await self._free(missing, deadline)
            try:
                return await self._load(model, deadline)
            except NoRoom as error:
                # The model is larger than estimated, or another gateway or a person has loaded one meanwhile.
                if time.monotonic() > deadline:
                    raise
                missing = error.missing

    async def _load(self, model: str, deadline: float) -> Model:
        try:
            loaded = await self._client.models.load(model, max(deadline - time.monotonic(), 1.0))
        except ModelNotFound:
            # Not counted: the name comes from the caller and must not become a metrics label.
            raise
        except TritonLMError:
            metrics.record_load(model, loaded=False)
            raise
        metrics.record_load(model, loaded=True)
        self._last_seen[model] = loaded
        self._needs[model] = _claimed(loaded)
        self._check_now.set()
        return loaded

    def _missing(self, model: str, ready: list[Model]) -> int:
        """An estimate of the bytes by which the model exceeds the free budget."""
        # A model that was never loaded is assumed to be as large as the smallest loaded one.
        known = self._last_seen.get(model) or min(ready, key=_claimed, default=None)
        if known is None or not known.memory_budget:
            return 0
        devices = _devices(known)
        others = [other for other in ready if other.id != model and _devices(other) & devices]
        taken = sum(map(_claimed, others))
        return max(0, taken + self._needs.get(known.id, 0) - known.memory_budget)

    async def _free(self, missing: int, deadline: float) -> None:
        """Unload the longest idle models until this many bytes are free."""
        while missing > 0:
            loaded = await self._ready()
            # A model with claims must first serve the requests that waited for it.
            unclaimed = [model for model in loaded if not self._claims[model.id]]
            if unclaimed:
                longest_idle = max(unclaimed, key=lambda model: (not model.running, model.idle_seconds or 0.0))
                await self._unload(longest_idle, "to make room", deadline)
                missing -= _claimed(longest_idle)
            elif not loaded:
                return
            else:
                if time.monotonic() > deadline:
                    raise NoRoom("all loaded models are in use; try again later", str(missing))
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _unload(self, model: Model, reason: str, deadline: float) -> None:
        _log.info("unloading %s %s", model.id, reason)
        await self._client.models.unload(model.id, max(deadline - time.monotonic(), 0.0))

    async def _ready(self) -> list[Model]:
        ready = [model for model in (await self._client.models.list()).data if model.state == "ready"]
        self._last_seen.update({model.id: model for model in ready})
        for model in ready:
            self._needs[model.id] = min(_claimed(model), self._needs.get(model.id, _claimed(model)))
        return ready

    async def _run(self) -> None:
        while True:
            pause = _MAX_CHECK_SECONDS
            try:
                # Not during a load: the memory of a model that is still being unloaded is not counted.
                async with self._load_lock:
                    pause = await self._unload_idle()
            except TritonLMError as error:
                _log.info("the check for idle models failed and will be repeated: %s", error.message)
            except Exception:
                # One failed check must not end the task.
                _log.exception("the check for idle models failed")
            self._check_now.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._check_now.wait(), pause)

    async def _unload_idle(self) -> float:
        """Unload the models that have been idle longer than their limit; returns the pause until the next check."""
        pause = _MAX_CHECK_SECONDS
        for model in await self._ready():
            limit = model.idle_unload_seconds
            if not limit:
                continue
            pause = min(pause, max(limit * _CHECK_FRACTION, _MIN_CHECK_SECONDS))
            if (model.idle_seconds or 0.0) >= limit and not self._claims[model.id]:
                await self._unload(model, f"after {limit:g} s without a request", time.monotonic() + pause)
        return pause


def _claimed(model: Model) -> int:
    """Its bytes of the memory budget; an engine of an older release reports them as `memory_bytes`."""
    return (model.memory_bytes if model.memory_claimed_bytes is None else model.memory_claimed_bytes) or 0


def _devices(model: Model) -> set[str]:
    return set((model.device or "").split(","))
