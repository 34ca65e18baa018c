"""Which language models stay loaded: the least recently used goes where another needs its room, the idle one in time.

The engines refuse to be loaded beyond the memory budget, and tell what they take and since when they are idle; this
room knows how to make them fit. Nothing is unloaded before its running requests, and those who waited for it, are done.
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

from . import metrics

_log = logging.getLogger("tritonlm.gateway")
_PAUSE_SECONDS = 0.05
# How often idle models are looked for: this share of the shortest patience, and never rarer than every so often.
_LOOK_SHARE, _SHORTEST_LOOK, _LONGEST_LOOK = 0.25, 0.1, 15.0


class Residence:
    def __init__(self, client: AsyncClient, claims: Mapping[str, int]) -> None:
        """`claims`: how many callers wait for a model, or are being served after a wait."""
        self._client, self._claims = client, claims
        # Where room is scarce one loads at a time, so that two do not make it for each other's models.
        self._one_by_one = asyncio.Lock()
        # What models looked like when they were last seen loaded, and the least that they have claimed of the budget:
        # so much room they will want when they are loaded again, since an engine's claim grows.
        self._seen: dict[str, Model] = {}
        self._needs: dict[str, int] = {}
        self._look_at_once = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def load(self, model: str, deadline: float) -> Model:
        """Load it, in the place of others where it must be."""
        try:
            if not any(seen.memory_budget for seen in [*await self._ready(), *self._seen.values()]):
                with contextlib.suppress(NoRoom):
                    return await self._load(model, deadline)
            async with self._one_by_one:
                return await self._load_instead(model, deadline)
        except NoRoom as error:
            # The number is for us.
            raise NoRoom(f"{model!r} cannot be loaded now: {error.message}", "model") from None

    async def _load_instead(self, model: str, deadline: float) -> Model:
        missing = self._missing(model, await self._ready())
        while True:
            await self._free(missing, deadline)
            try:
                return await self._load(model, deadline)
            except NoRoom as error:
                # It is larger than was known; or another gateway, or a person, was faster.
                if time.monotonic() > deadline:
                    raise
                missing = error.missing

    async def _load(self, model: str, deadline: float) -> Model:
        try:
            loaded = await self._client.models.load(model, max(deadline - time.monotonic(), 1.0))
        except ModelNotFound:
            # A name that somebody made up.
            raise
        except TritonLMError:
            metrics.record_load(model, loaded=False)
            raise
        metrics.record_load(model, loaded=True)
        self._seen[model] = loaded
        self._needs[model] = _claimed(loaded)
        self._look_at_once.set()
        return loaded

    def _missing(self, model: str, ready: list[Model]) -> int:
        """As far as is known, by how much it is too large for what is left of the budget."""
        # Of one that was never loaded no more is known than that it is hardly smaller than all others.
        known = self._seen.get(model) or min(ready, key=_claimed, default=None)
        if known is None or not known.memory_budget:
            return 0
        mine = _devices(known)
        others = [other for other in ready if other.id != model and _devices(other) & mine]
        taken = sum(map(_claimed, others))
        return max(0, taken + self._needs.get(known.id, 0) - known.memory_budget)

    async def _free(self, missing: int, deadline: float) -> None:
        """Unload the longest idle models until this much is free."""
        while missing > 0:
            loaded = await self._ready()
            # Who waited long for a model must get its answer before the model goes: else nobody ever would.
            free = [model for model in loaded if not self._claims[model.id]]
            if free:
                longest = max(free, key=lambda model: (not model.running, model.idle_seconds or 0.0))
                await self._unload(longest, "to make room", deadline)
                missing -= _claimed(longest)
            elif not loaded:
                return
            else:
                if time.monotonic() > deadline:
                    raise NoRoom("the models that are loaded are all in use; try again later", str(missing))
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _unload(self, model: Model, why: str, deadline: float) -> None:
        _log.info("unloading %s %s", model.id, why)
        await self._client.models.unload(model.id, max(deadline - time.monotonic(), 0.0))

    async def _ready(self) -> list[Model]:
        ready = [model for model in (await self._client.models.list()).data if model.state == "ready"]
        self._seen.update({model.id: model for model in ready})
        for model in ready:
            self._needs[model.id] = min(_claimed(model), self._needs.get(model.id, _claimed(model)))
        return ready

    async def _keep(self) -> None:
        while True:
            pause = _LONGEST_LOOK
            try:
                # Not beside a load: what is still on its way out takes room that nobody counts any more.
                async with self._one_by_one:
                    pause = await self._unload_idle()
            except TritonLMError as error:
                _log.info("idle models are looked for later: %s", error.message)
            except Exception:
                # Whatever went wrong with one look must not end the watch over all models.
                _log.exception("looking for idle models failed")
            self._look_at_once.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._look_at_once.wait(), pause)

    async def _unload_idle(self) -> float:
        """Unload what nobody has used for so long as it says; how long to wait until the next look."""
        pause = _LONGEST_LOOK
        for model in await self._ready():
            patience = model.idle_unload_seconds
            if not patience:
                continue
            pause = min(pause, max(patience * _LOOK_SHARE, _SHORTEST_LOOK))
            if (model.idle_seconds or 0.0) >= patience and not self._claims[model.id]:
                await self._unload(model, f"after {patience:g} s without a request", time.monotonic() + pause)
        return pause


def _claimed(model: Model) -> int:
    """Bytes of the memory budget; an engine of an older release takes them all at once, and calls them its memory."""
    return (model.memory_bytes if model.memory_claimed_bytes is None else model.memory_claimed_bytes) or 0


def _devices(model: Model) -> set[str]:
    return set((model.device or "").split(","))
