"""The language models of all of a client's Tritons: list, describe, load, replace and unload them.

Calls to a loaded model are made by `async_client`. Which models should stay loaded, the caller decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from tritonlm.client.model_names import ModelNames, ServedModel
from tritonlm.client.transport import RepositoryModel, Transport
from tritonlm.client.types import Model, ModelList
from tritonlm.contract import (
    AdapterNotFound,
    CheckpointError,
    ModelNotFound,
    NotLoaded,
    TimedOut,
    TritonLMError,
    Unavailable,
)
from tritonlm.contract.adapters_file import AdapterEntry
from tritonlm.contract.control import ABOUT, RETIRE, STATUS, Command

_POLL_SECONDS = 0.05
# The timeout of a health probe of one LM.
_PROBE_SECONDS = 2.0
# Fields of an engine's status that are copied into a model's description.
_STATUS_FIELDS = (
    "created", "device", "dtype", "running", "waiting", "memory_bytes", "memory_budget", "idle_seconds",
    "idle_unload_seconds",
)  # fmt: skip
# The same, for fields that an engine of an older release does not report.
_OPTIONAL_FIELDS = ("memory_reserved_bytes", "memory_claimed_bytes", "full_context_slots")


# The status reports of the engines by LM, one of each Triton.
EngineReports = dict[str, list[dict[str, Any]]]


def slots_of(report: dict[str, Any]) -> int:
    """The engine's slots; an engine of an older release calls them places."""
    return int(report["slots"] if "slots" in report else report["places"])


class Models:
    def __init__(self, transports: Sequence[Transport], names: ModelNames) -> None:
        self._transports, self._names = transports, names
        # A loaded model's training record does not change until the model is loaded again.
        self._training: dict[tuple[str, str, float], dict[str, Any] | None] = {}

    async def list(self) -> ModelList:
        """The language models of all Tritons; a model that is ready anywhere is ready."""
        results = await asyncio.gather(*map(self._describe_all, self._transports), return_exceptions=True)
        models: dict[str, Model] = {}
        for result in results:
            if isinstance(result, BaseException):
                # A Triton that is down does not hide the models of the others.
                if not isinstance(result, (Unavailable, TimedOut)) or all(map(_is_error, results)):
                    raise result
                continue
            for model in result:
                if model.id not in models or model.state == "ready":
                    models[model.id] = model
        return ModelList(data=sorted(models.values(), key=lambda model: model.id))

    async def with_adapters(self) -> ModelList:
        """The language models and their adapters, as far as this client knows their names."""
        models = (await self.list()).data
        known = self._names.adapters()
        # A name that several have, or a language model too, tells nothing alone.
        names = Counter([model.id for model in models] + [name for adapters in known.values() for name in adapters])
        adapters = [
            _adapter_of(model, ServedModel(name if names[name] == 1 else f"{model.id}:{name}", model.id, name), entry)
            for model in models
            for name, entry in known.get(model.id, {}).items()
        ]
        return ModelList(data=[*models, *adapters])

    async def retrieve(self, model: str) -> Model:
        """A language model, or an adapter."""
        served = self._names.resolve(model)
        base = next((entry for entry in (await self.list()).data if entry.id == served.lm), None)
        if base is None:
            raise ModelNotFound(f"the model {model!r} does not exist", "model")
        if not served.adapter:
            return base
        known = self._names.adapters().get(served.lm, {})
        if served.adapter not in known:
            raise AdapterNotFound.of(served.adapter, served.lm, known)
        return _adapter_of(base, served, known[served.adapter])

    async def reports(self) -> EngineReports:
        """The status reports of all engines by LM, from all Tritons that answer."""
        by_triton = await asyncio.gather(*map(_reports, self._transports))
        reports: EngineReports = {}
        for name, report in sorted((pair for pairs in by_triton for pair in pairs), key=lambda pair: pair[0]):
            reports.setdefault(name, []).append(report)
        return reports

    async def load(self, model: str, timeout: float = 600.0) -> Model:
        """Load it on every Triton. A loaded model is replaced if its checkpoint has changed on disk."""
        await self.retrieve(model)
        failures: list[TritonLMError] = []
        # One after the other, so that the other Tritons keep serving.
        for transport in self._transports:
            try:
                await _load(transport, model, timeout)
            except (Unavailable, TimedOut) as error:
                # A Triton that is down does not prevent the load on the others.
                failures.append(error)
        if len(failures) == len(self._transports):
            raise failures[0]
        return await self.retrieve(model)

    async def unload(self, model: str, timeout: float = 600.0) -> Model:
        """Unload it on every Triton once its running requests have ended. New requests are refused meanwhile."""
        deadline = time.monotonic() + timeout
        await asyncio.gather(*(_unload(transport, model, deadline) for transport in self._transports))
        return await self.retrieve(model)

    async def _describe_all(self, transport: Transport) -> Sequence[Model]:
        return [await self._describe(transport, entry) for entry in await transport.models()]

    async def _describe(self, transport: Transport, entry: RepositoryModel) -> Model:
        if not entry.ready:
            state: Literal["loading", "unavailable"] = "loading" if entry.loading else "unavailable"
            return Model(id=entry.name, created=0, state=state, reason=entry.reason or "not loaded")
        try:
            report = await transport.command(entry.name, Command(STATUS))
            training = await self._training_record(transport, entry.name, report["created"])
        except TritonLMError as error:
            return Model(id=entry.name, created=0, state="unavailable", reason=error.message)
        fields = {name: report[name] for name in _STATUS_FIELDS} | {name: report.get(name) for name in _OPTIONAL_FIELDS}
        fields["slots"] = fields["places"] = slots_of(report)
        return Model(id=entry.name, state="ready", max_model_len=report["context_length"], training=training, **fields)

    async def _training_record(self, transport: Transport, model: str, created: float) -> dict[str, Any] | None:
        key = (transport.url, model, created)
        if key not in self._training:
            record = (await transport.command(model, Command(ABOUT)))["training"] or None
            # Drop the record of an earlier load of the same model.
            self._training = {other: value for other, value in self._training.items() if other[:2] != key[:2]}
            self._training[key] = record
        return self._training[key]


def _adapter_of(base: Model, served: ServedModel, entry: AdapterEntry) -> Model:
    return Model(
        id=served.name,
        created=base.created,
        state=base.state,
        reason=base.reason,
        max_model_len=base.max_model_len,
        parent=base.id,
        root=entry.source or entry.path,
    )


async def _reports(transport: Transport) -> list[tuple[str, dict[str, Any]]]:
    """The status reports of the LMs that are ready and answer."""
    try:
        names = [model.name for model in await transport.models() if model.ready]
    except TritonLMError:
        return []
    reports = await asyncio.gather(
        *(transport.command(name, Command(STATUS)) for name in names), return_exceptions=True
    )
    return [(name, report) for name, report in zip(names, reports, strict=True) if isinstance(report, dict)]


async def _load(transport: Transport, model: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with contextlib.suppress(NotLoaded, ModelNotFound):
        report = await transport.command(model, Command(STATUS))
        if report["stale"]:
            if report["broken"]:
                # Keep the old model if the new checkpoint is incomplete.
                raise CheckpointError(report["broken"])
            await _unload(transport, model, deadline)
    await transport.load(model, max(deadline - time.monotonic(), 1.0))


async def _unload(transport: Transport, model: str, deadline: float) -> None:
    """Refuse new requests, wait for the running ones, unload. After a timeout the model accepts requests again."""
    while await _is_busy(transport, model):
        if time.monotonic() > deadline:
            raise TimedOut(f"the running requests of {model!r} did not end in time; it stays loaded")
        await asyncio.sleep(_POLL_SECONDS)
    await transport.unload(model)


async def _is_busy(transport: Transport, model: str) -> bool:
    try:
        report = await transport.command(model, Command(RETIRE))
    except TritonLMError:
        # Not loaded, or its engine does not answer: there is nothing to wait for.
        return False
    return bool(report["running"] + report["waiting"])


def _is_error(result: object) -> bool:
    return isinstance(result, BaseException)


async def probe(transport: Transport) -> tuple[set[str], set[str]]:
    """The LMs that Triton lists as ready: those whose processes all answer, and those that do not or are draining."""
    try:
        names = [model.name for model in await transport.models() if model.ready]
    except TritonLMError:
        return set(), set()
    results = await asyncio.gather(*(_is_healthy(transport, name) for name in names))
    healthy = {name for name, is_healthy in zip(names, results, strict=True) if is_healthy}
    return healthy, set(names) - healthy


async def _is_healthy(transport: Transport, name: str) -> bool:
    try:
        return not (await asyncio.wait_for(transport.ping(name), _PROBE_SECONDS))["draining"]
    except (TritonLMError, TimeoutError, asyncio.TimeoutError):
        return False
