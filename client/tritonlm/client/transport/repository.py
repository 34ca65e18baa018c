"""Triton's model repository over gRPC: which language models it has, which models make one, loading and unloading.

It computes nothing with the models: their calls are `grpc_transport`'s.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2

from tritonlm.access import control_secret as secret
from tritonlm.contract import ModelNotFound, NotLoaded, tensors
from tritonlm.contract.parts import part_of

from . import RepositoryModel
from .grpc_stream import grpc_errors

_REQUEST_SECONDS = 5.0
_UNLOAD_SECONDS, _POLL_SECONDS = 10.0, 0.02


@dataclass(frozen=True)
class Parts:
    """The names of the three models in an LM's ensemble."""

    tokenize: str
    generate: str
    detokenize: str

    @property
    def names(self) -> set[str]:
        return {self.tokenize, self.generate, self.detokenize}


class Repository:
    def __init__(self, stub: Any, url: str) -> None:
        self._stub, self._url = stub, url
        self._parts: dict[str, Parts] = {}

    async def parts_of(self, model: str) -> Parts:
        if model not in self._parts:
            parts = _read_parts(await self._config(model))
            if parts is None:
                raise ModelNotFound(f"{model!r} is not a language model", "model")
            self._parts[model] = parts
        return self._parts[model]

    async def _config(self, model: str) -> Any:
        with grpc_errors(self._url):
            request = service_pb2.ModelConfigRequest(name=model)
            return (await self._stub.ModelConfig(request, timeout=_REQUEST_SECONDS)).config

    async def models(self) -> list[RepositoryModel]:
        with grpc_errors(self._url):
            index = await self._index()
        models, part_names = [], set()
        for entry in index:
            ready = entry.state == "READY"
            try:
                config = await self._config(entry.name) if ready else None
            except (NotLoaded, ModelNotFound):
                # It was unloaded in the meantime.
                ready, config = False, None
            if config is not None:
                parts = _read_parts(config)
                if parts is None:
                    continue
                part_names |= parts.names
            models.append(RepositoryModel(entry.name, ready, entry.reason, entry.state == "LOADING"))
        # A model that is not loaded has no config; parts of LMs are then recognized by their names.
        return [model for model in models if model.name not in part_names and not part_of(model.name)]

    async def load(self, model: str, timeout: float) -> None:
        self._parts.pop(model, None)
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        with grpc_errors(self._url):
            await self._stub.RepositoryModelLoad(request, timeout=timeout, metadata=self._credentials())

    async def unload(self, model: str) -> None:
        """Unload it and its parts, and wait (with a limit) until their processes have ended and freed their memory."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        request.parameters["unload_dependents"].bool_param = True
        names = {model, *(self._parts[model].names if model in self._parts else ())}
        with grpc_errors(self._url):
            await self._stub.RepositoryModelUnload(request, timeout=_UNLOAD_SECONDS, metadata=self._credentials())
            deadline = asyncio.get_running_loop().time() + _UNLOAD_SECONDS
            while names & {entry.name for entry in await self._index() if entry.state in ("READY", "UNLOADING")}:
                if asyncio.get_running_loop().time() > deadline:
                    # Triton may wait forever for a lost stream; callers cannot use the model any more.
                    return
                await asyncio.sleep(_POLL_SECONDS)

    async def _index(self) -> Any:
        request = service_pb2.RepositoryIndexRequest()
        metadata = self._credentials()
        return (await self._stub.RepositoryIndex(request, timeout=_REQUEST_SECONDS, metadata=metadata)).models

    def _credentials(self) -> list[tuple[str, str]]:
        """The metadata with the secret that Triton's control API requires."""
        value = secret.secret_for(self._url.rpartition("://")[2])
        return [(secret.GRPC_HEADER, value)] if value else []


def _read_parts(config: Any) -> Parts | None:
    """The parts of a model's ensemble; None if it is not a language model."""
    by_input = {name: step.model_name for step in config.ensemble_scheduling.step for name in step.input_map}
    inputs = (tensors.TEXT_INPUT.name, tensors.PROMPT_IDS.name, tensors.CHUNK.name)
    return Parts(*(by_input[name] for name in inputs)) if by_input.keys() >= set(inputs) else None
