"""The language models of all Tritons a client knows: list, look at, load, replace, unload.

It knows the life of a model; what is asked of a loaded one is `client`'s matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Literal

from tritonlm.client.transport import Listed, Transport
from tritonlm.client.types import Model, ModelList
from tritonlm.contract import CheckpointError, ModelNotFound, NotLoaded, TimedOut, TritonLMError, Unavailable
from tritonlm.contract.control import ABOUT, RETIRE, STATUS, Command

_POLL_SECONDS = 0.05
# How long a look at an LM's health may take.
_LOOK_SECONDS = 2.0
# What of an engine's status a model's description repeats.
_TOLD = (
    "created", "device", "dtype", "places", "running", "waiting", "memory_bytes", "memory_budget", "idle_seconds",
    "idle_unload_seconds",
)  # fmt: skip
# An engine of an older release does not report these.
_NEW = ("memory_reserved_bytes", "memory_claimed_bytes", "full_context_slots")


# What engines tell of themselves, by LM: one of each Triton.
EngineReports = dict[str, list[dict[str, Any]]]


class Models:
    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = transports
        # What a loaded model's training record says does not change until it is loaded anew.
        self._training: dict[tuple[str, str, float], dict[str, Any] | None] = {}

    async def list(self) -> ModelList:
        """The language models of all Tritons; a model that is ready anywhere is ready."""
        answers = await asyncio.gather(*map(self._described, self._transports), return_exceptions=True)
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

    async def reports(self) -> EngineReports:
        """By LM, what each of its engines tells of itself, on all Tritons that answer."""
        looks = await asyncio.gather(*map(_reports, self._transports))
        found: EngineReports = {}
        for name, report in sorted((pair for look in looks for pair in look), key=lambda pair: pair[0]):
            found.setdefault(name, []).append(report)
        return found

    async def load(self, model: str, timeout: float = 600.0) -> Model:
        """Load it on every Triton. Where it is loaded and its checkpoint has changed on disk, that takes its place."""
        await self.retrieve(model)
        failures: list[TritonLMError] = []
        # One after the other: the others go on serving.
        for transport in self._transports:
            try:
                await _load(transport, model, timeout)
            except (Unavailable, TimedOut) as error:
                # One that is down does not keep the others from serving.
                failures.append(error)
        if len(failures) == len(self._transports):
            raise failures[0]
        return await self.retrieve(model)

    async def unload(self, model: str, timeout: float = 600.0) -> Model:
        """Unload it on every Triton once its running requests have ended; new ones are refused meanwhile."""
        deadline = time.monotonic() + timeout
        await asyncio.gather(*(_unload(transport, model, deadline) for transport in self._transports))
        return await self.retrieve(model)

    async def _described(self, transport: Transport) -> Sequence[Model]:
        return [await self._describe(transport, listed) for listed in await transport.models()]

    async def _describe(self, transport: Transport, listed: Listed) -> Model:
        if not listed.ready:
            state: Literal["loading", "unavailable"] = "loading" if listed.loading else "unavailable"
            return Model(id=listed.name, created=0, state=state, reason=listed.reason or "not loaded")
        try:
            report = await transport.command(listed.name, Command(STATUS))
            training = await self._training_of(transport, listed.name, report["created"])
        except TritonLMError as error:
            return Model(id=listed.name, created=0, state="unavailable", reason=error.message)
        told = {name: report[name] for name in _TOLD} | {name: report.get(name) for name in _NEW}
        return Model(id=listed.name, state="ready", max_model_len=report["context_length"], training=training, **told)

    async def _training_of(self, transport: Transport, model: str, created: float) -> dict[str, Any] | None:
        key = (transport.url, model, created)
        if key not in self._training:
            found = (await transport.command(model, Command(ABOUT)))["training"] or None
            # Of a model that was loaded again only the newest counts.
            self._training = {known: value for known, value in self._training.items() if known[:2] != key[:2]}
            self._training[key] = found
        return self._training[key]


async def _reports(transport: Transport) -> list[tuple[str, dict[str, Any]]]:
    """Of the LMs that are ready; of one that does not answer, nothing."""
    try:
        listed = [model.name for model in await transport.models() if model.ready]
    except TritonLMError:
        return []
    found = await asyncio.gather(*(transport.command(name, Command(STATUS)) for name in listed), return_exceptions=True)
    return [(name, report) for name, report in zip(listed, found, strict=True) if isinstance(report, dict)]


async def _load(transport: Transport, model: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with contextlib.suppress(NotLoaded, ModelNotFound):
        report = await transport.command(model, Command(STATUS))
        if report["stale"]:
            if report["broken"]:
                # Better an old model than none: what is to replace it must be whole.
                raise CheckpointError(report["broken"])
            await _unload(transport, model, deadline)
    await transport.load(model, max(deadline - time.monotonic(), 1.0))


async def _unload(transport: Transport, model: str, deadline: float) -> None:
    """Let what runs end, refuse the rest meanwhile, and make room. Given up, the model serves on after a moment."""
    while await _still_runs(transport, model):
        if time.monotonic() > deadline:
            raise TimedOut(f"the running requests of {model!r} did not end in time; it stays loaded")
        await asyncio.sleep(_POLL_SECONDS)
    await transport.unload(model)


async def _still_runs(transport: Transport, model: str) -> bool:
    try:
        report = await transport.command(model, Command(RETIRE))
    except TritonLMError:
        # It is not loaded, or its engine does not answer: there is nothing to wait for.
        return False
    return bool(report["running"] + report["waiting"])


def _failed(answer: object) -> bool:
    return isinstance(answer, BaseException)


async def look(transport: Transport) -> tuple[set[str], set[str]]:
    """Of the LMs that a Triton calls ready: those whose processes all answer, and those that do not or are stopping."""
    try:
        listed = [model.name for model in await transport.models() if model.ready]
    except TritonLMError:
        return set(), set()
    answers = await asyncio.gather(*(_answers(transport, name) for name in listed))
    well = {name for name, answered in zip(listed, answers, strict=True) if answered}
    return well, set(listed) - well


async def _answers(transport: Transport, name: str) -> bool:
    try:
        return not (await asyncio.wait_for(transport.ping(name), _LOOK_SECONDS))["draining"]
    except (TritonLMError, TimeoutError, asyncio.TimeoutError):
        return False
