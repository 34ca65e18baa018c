"""The language models of all Tritons a client knows: list, look at, load, replace, unload.

It knows the life of a model; what is asked of a loaded one is `client`'s matter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

from tritonlm.contract import ModelNotFound, NotLoaded, TimedOut, TritonLMError, Unavailable
from tritonlm.contract.control import PING, RETIRE, STATUS, Command
from tritonlm.transport import Listed, Transport
from tritonlm.types import Model, ModelList

_POLL_SECONDS = 0.05


class Models:
    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = transports

    async def list(self) -> ModelList:
        """The language models of all Tritons; a model that is ready anywhere is ready."""
        answers = await asyncio.gather(*map(_described, self._transports), return_exceptions=True)
        found: dict[str, Model] = {}
        for answer in answers:
            if isinstance(answer, BaseException):
                # One that is down does not hide what the others serve.
                if not isinstance(answer, (Unavailable, TimedOut)) or all(map(_failed, answers)):
                    raise answer
                continue
            for model in answer:
                if model.id not in found or model.state == "ready":
                    found[model.id] = model
        return ModelList(data=sorted(found.values(), key=lambda model: model.id))

    async def retrieve(self, model: str) -> Model:
        for found in (await self.list()).data:
            if found.id == model:
                return found
        raise ModelNotFound(f"the model {model!r} does not exist", "model")

    async def load(self, model: str, timeout: float = 600.0) -> Model:
        """Load it on every Triton. Where it is loaded and its checkpoint has changed on disk, that takes its place."""
        await self.retrieve(model)
        # One after the other: the others go on serving.
        for transport in self._transports:
            await _load(transport, model, timeout)
        return await self.retrieve(model)

    async def unload(self, model: str) -> Model:
        await asyncio.gather(*(transport.unload(model) for transport in self._transports))
        return await self.retrieve(model)


async def _load(transport: Transport, model: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        stale = (await transport.command(model, Command(STATUS)))["stale"]
    except (NotLoaded, ModelNotFound):
        stale = False
    if stale:
        await _retire(transport, model, deadline)
    await transport.load(model, max(deadline - time.monotonic(), 1.0))


async def _retire(transport: Transport, model: str, deadline: float) -> None:
    """Let what runs end, refuse the rest for the moment, and make room."""
    await transport.command(model, Command(RETIRE))
    while (report := await transport.command(model, Command(STATUS)))["running"] + report["waiting"]:
        if time.monotonic() > deadline:
            raise TimedOut(
                f"the running requests of {model!r} did not end in time; it takes no new ones: load it again"
            )
        await asyncio.sleep(_POLL_SECONDS)
    await transport.unload(model)


def _failed(answer: object) -> bool:
    return isinstance(answer, BaseException)


async def _described(transport: Transport) -> list[Model]:
    return [await _describe(transport, listed) for listed in await transport.models()]


async def _describe(transport: Transport, listed: Listed) -> Model:
    if not listed.ready:
        state: Literal["loading", "unavailable"] = "loading" if listed.loading else "unavailable"
        return Model(id=listed.name, created=0, state=state, reason=listed.reason or "not loaded")
    try:
        report = await transport.command(listed.name, Command(STATUS))
    except TritonLMError as error:
        return Model(id=listed.name, created=0, state="unavailable", reason=error.message)
    return Model(
        id=listed.name,
        created=report["created"],
        state="ready",
        max_model_len=report["context_length"],
        device=report["device"],
        dtype=report["dtype"],
        places=report["places"],
        running=report["running"],
        waiting=report["waiting"],
    )


async def answering(transport: Transport) -> set[str]:
    """The models of a Triton whose engines answer their ping."""
    try:
        listed = await transport.models()
    except TritonLMError:
        return set()
    return {model.name for model in listed if await _answers(transport, model)}


async def _answers(transport: Transport, listed: Listed) -> bool:
    try:
        return listed.ready and bool(await transport.command(listed.name, Command(PING)))
    except TritonLMError:
        return False
