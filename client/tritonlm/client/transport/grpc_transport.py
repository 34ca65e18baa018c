"""One Triton over gRPC: one channel, one bidirectional stream per request.

Whoever leaves a stream early has the engine cancel its request: Triton does not tell a running ensemble that its
caller is gone. The cancel and the draining of the stream go on in the background, bounded in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tritonlm.access import control_secret as secret
from tritonlm.client.types import Piece
from tritonlm.contract import (
    Broken,
    Chunk,
    GenerationRequest,
    ModelNotFound,
    NotLoaded,
    SamplingParameters,
    TimedOut,
    TritonLMError,
    Unavailable,
    tensors,
)
from tritonlm.contract.control import CANCEL, KNOWN, MAX_IDS, PING, Command
from tritonlm.contract.errors import from_wire
from tritonlm.contract.parts import part_of
from tritonlm.contract.tensors import TensorSpec
from tritonlm.observability.tracing import TRACEPARENT

from . import Call, Embedded, Listed, Prompt
from .responses import Responses, grpc_errors, once
from .watch import Watch, Watched
from .wire import Outputs, infer_request, piece_of

_COMMAND_SECONDS = 5.0
# The engine keeps a request's time limit itself; this is for a Triton that has stopped answering.
_GRACE_SECONDS = 10.0
_ABANDON_SECONDS = 30.0
# A stream whose request the engine has cancelled, or has lost, ends in this time or never.
_LOST_SECONDS = 3.0
_FIRST_CANCEL_SECONDS, _LAST_CANCEL_SECONDS = 0.02, 1.0
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(frozen=True)
class Parts:
    """The models that an LM ties together."""

    tokenize: str
    generate: str
    detokenize: str


class GrpcTransport:
    def __init__(self, url: str, connect_timeout: float, authorities: bytes | None = None) -> None:
        """grpcs://HOST:PORT is encrypted; `authorities` are the certificates that may vouch for it (the system's)."""
        self.url = url
        scheme, _, rest = url.rpartition("://")
        self._address = rest
        self._connect_timeout = connect_timeout
        # How long one attempt to connect may take; without it a host that does not answer holds a call up for 20 s.
        patience = ("grpc.min_reconnect_backoff_ms", round(connect_timeout * 1000))
        options = [*_OPTIONS, patience]
        if scheme == "grpcs":
            self._channel = grpc.aio.secure_channel(rest, grpc.ssl_channel_credentials(authorities), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(rest, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._parts: dict[str, Parts] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._watches: dict[str, Watch] = {}

    async def close(self) -> None:
        """Let the cancels that are under way come through, then close the channel."""
        for watch in self._watches.values():
            watch.close()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=_ABANDON_SECONDS)
        await self._channel.close()

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        inputs = {**_prompt(call.prompt), tensors.STREAM: call.stream, tensors.EXCLUDE_INPUT: True}
        inputs[tensors.SAMPLING_PARAMETERS] = json.dumps({**call.parameters, "timeout": call.timeout, "as_piece": True})
        request = infer_request(call.model, inputs, [tensors.PIECE], call.request_id, call.traceparent)
        stream = Responses(
            self._stub.ModelStreamInfer(
                once(request), timeout=call.timeout + _GRACE_SECONDS, metadata=_trace(call.traceparent)
            )
        )
        ended, watched, patience = False, Watched(call.request_id, stream.fail), _ABANDON_SECONDS
        self._watch(call.model).enter(watched)
        try:
            with grpc_errors(self.url):
                while (message := await stream.next()) is not None:
                    if message.error_message:
                        raise from_wire(message.error_message)
                    watched.hear()
                    piece = piece_of(message.infer_response)
                    ended = bool(piece.finish_reason)
                    yield piece
                    if ended:
                        return
                ended = True
                raise Broken(f"Triton at {self.url} ended the stream before the answer's end")
        except TritonLMError as error:
            # Out of time, or without a sign of life, is not over: the engine may still be at it.
            ended = ended or not isinstance(error, (TimedOut, Broken))
            patience = _LOST_SECONDS if isinstance(error, Broken) else _ABANDON_SECONDS
            raise
        finally:
            self._leave(call.model, watched)
            if not ended:
                self._in_background(self._abandon(call, stream, patience))

    async def embed(self, call: Call) -> Embedded:
        """Straight to `generate`: the ensemble's outputs are those of a text."""
        ids, parts = await self.tokenize(call.model, call.prompt), await self._parts_of(call.model)
        parameters = SamplingParameters(max_tokens=0, echo=True, seed=0, timeout=call.timeout)
        wanted = GenerationRequest(parameters, embed=True).to_json()
        request = infer_request(
            parts.generate,
            {tensors.PROMPT_IDS: ids, tensors.REQUEST: wanted},
            [tensors.EMBEDDING, tensors.USAGE],
            call.request_id,
            call.traceparent,
        )
        stream = Responses(self._stub.ModelStreamInfer(once(request), timeout=call.timeout + _GRACE_SECONDS))
        ended, watched = False, Watched(call.request_id, stream.fail)
        self._watch(call.model).enter(watched)
        try:
            with grpc_errors(self.url):
                while (message := await stream.next()) is not None:
                    ended = True
                    if message.error_message:
                        raise from_wire(message.error_message)
                    outputs = Outputs(message.infer_response)
                    vector = [float(value) for value in outputs.numbers(tensors.EMBEDDING)]
                    return Embedded(vector, outputs.numbers(tensors.USAGE)[0])
            raise Broken(f"Triton at {self.url} ended the stream without an embedding")
        finally:
            self._leave(call.model, watched)
            if not ended:
                self._in_background(self._abandon(call, stream))

    def _watch(self, model: str) -> Watch:
        if model not in self._watches:

            async def known(request_ids: Sequence[str]) -> list[str]:
                # Of more than can be asked for at once the others' turn comes at the next look.
                command = Command(KNOWN, request_ids=tuple(request_ids[:MAX_IDS]))
                found: list[str] = (await self.command(model, command))["known"]
                return [*found, *request_ids[MAX_IDS:]]

            self._watches[model] = Watch(model, lambda: self.ping(model), known)
        return self._watches[model]

    def _leave(self, model: str, watched: Watched) -> None:
        watch = self._watches[model]
        watch.leave(watched)
        if watch.is_idle:
            # Callers may name anything: what nobody calls leaves no trace.
            watch.close()
            del self._watches[model]

    async def ping(self, model: str) -> dict[str, Any]:
        others = asyncio.gather(self.tokenize(model, Prompt(input_ids=(0,))), self.detokenize(model, [0]))
        report: dict[str, Any] = (await asyncio.gather(self.command(model, Command(PING)), others))[0]
        return report

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _abandon(self, call: Call, stream: Responses, patience: float = _ABANDON_SECONDS) -> None:
        """Cancel until the stream has ended: the first cancel may come before the request itself."""
        drained = asyncio.ensure_future(stream.drain())
        clock = asyncio.get_running_loop().time
        pause, deadline = _FIRST_CANCEL_SECONDS, clock() + patience
        try:
            while not drained.done() and clock() < deadline:
                with contextlib.suppress(TritonLMError):
                    if (await self.command(call.model, Command(CANCEL, call.request_id)))["cancelled"]:
                        deadline = min(deadline, clock() + _LOST_SECONDS)
                await asyncio.wait([drained], timeout=pause)
                pause = min(2 * pause, _LAST_CANCEL_SECONDS)
        finally:
            drained.cancel()
            stream.cancel()

    async def command(self, model: str, command: Command) -> dict[str, Any]:
        parts = await self._parts_of(model)
        request = infer_request(parts.generate, {tensors.CONTROL: command.to_json()}, [tensors.REPORT])
        with grpc_errors(self.url):
            async for message in self._stub.ModelStreamInfer(once(request), timeout=_COMMAND_SECONDS):
                if message.error_message:
                    raise from_wire(message.error_message)
                report: dict[str, Any] = json.loads(Outputs(message.infer_response).text(tensors.REPORT))
                return report
        raise Unavailable(f"the engine of {model!r} at {self.url} gave no answer to {command.name!r}")

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        parts = await self._parts_of(model)
        # Without the output `request` nothing is asked of the engine, and the prompt may have any length.
        inputs = _prompt(prompt)
        if not add_special_tokens:
            inputs[tensors.SAMPLING_PARAMETERS] = json.dumps({"add_special_tokens": False})
        return (await self._infer(parts.tokenize, inputs, tensors.PROMPT_IDS)).numbers(tensors.PROMPT_IDS)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        parts = await self._parts_of(model)
        chunk = Chunk(0, list(ids), len(ids), 0, 0, skip_special_tokens=False)
        inputs: dict[TensorSpec, object] = {tensors.CHUNK: chunk.to_json()}
        return (await self._infer(parts.detokenize, inputs, tensors.TEXT_OUTPUT)).text(tensors.TEXT_OUTPUT)

    async def _infer(self, model: str, inputs: Mapping[TensorSpec, object], output: TensorSpec) -> Outputs:
        with grpc_errors(self.url):
            return Outputs(
                await self._stub.ModelInfer(infer_request(model, inputs, [output]), timeout=_COMMAND_SECONDS)
            )

    async def _parts_of(self, model: str) -> Parts:
        if model not in self._parts:
            found = _parts_in(await self._config(model))
            if found is None:
                raise ModelNotFound(f"{model!r} is not a language model", "model")
            self._parts[model] = found
        return self._parts[model]

    async def _config(self, model: str) -> Any:
        with grpc_errors(self.url):
            request = service_pb2.ModelConfigRequest(name=model)
            return (await self._stub.ModelConfig(request, timeout=_COMMAND_SECONDS)).config

    async def models(self) -> list[Listed]:
        with grpc_errors(self.url):
            index = await self._index()
        found, parts = [], set()
        for entry in index:
            ready = entry.state == "READY"
            try:
                config = await self._config(entry.name) if ready else None
            except (NotLoaded, ModelNotFound):
                # It has been unloaded since.
                ready, config = False, None
            if config is not None:
                tied = _parts_in(config)
                if tied is None:
                    continue
                parts |= set(_names(tied))
            found.append(Listed(entry.name, ready, entry.reason, entry.state == "LOADING"))
        # What is not loaded does not tell what it is: parts of LMs are left out by their names.
        return [model for model in found if model.name not in parts and not part_of(model.name)]

    async def load(self, model: str, timeout: float) -> None:
        self._parts.pop(model, None)
        with grpc_errors(self.url):
            await self._stub.RepositoryModelLoad(
                service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=timeout, metadata=self._opening()
            )

    async def unload(self, model: str) -> None:
        """Unload it and its parts, and see their processes end, within bounds: only then their memory is free."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        request.parameters["unload_dependents"].bool_param = True
        names = {model, *(_names(self._parts[model]) if model in self._parts else ())}
        with grpc_errors(self.url):
            await self._stub.RepositoryModelUnload(request, timeout=_GRACE_SECONDS, metadata=self._opening())
            deadline = asyncio.get_running_loop().time() + _GRACE_SECONDS
            while names & {entry.name for entry in await self._index() if entry.state in ("READY", "UNLOADING")}:
                if asyncio.get_running_loop().time() > deadline:
                    # Triton may wait for ever for a stream that it lost; to callers the model is unloaded all the same.
                    return
                await asyncio.sleep(_FIRST_CANCEL_SECONDS)

    async def _index(self) -> Any:
        request = service_pb2.RepositoryIndexRequest()
        return (await self._stub.RepositoryIndex(request, timeout=_COMMAND_SECONDS, metadata=self._opening())).models

    def _opening(self) -> list[tuple[str, str]]:
        """What opens the calls that Triton keeps for those who know its secret."""
        found = secret.of(self._address)
        return [(secret.GRPC_HEADER, found)] if found else []

    async def is_live(self) -> bool:
        try:
            answer = await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=self._connect_timeout)
        except grpc.RpcError:
            return False
        return bool(answer.live)


def _parts_in(config: Any) -> Parts | None:
    """The parts that a model ties together; None where it is no language model."""
    by_input = {name: step.model_name for step in config.ensemble_scheduling.step for name in step.input_map}
    inputs = (tensors.TEXT_INPUT.name, tensors.PROMPT_IDS.name, tensors.CHUNK.name)
    return Parts(*(by_input[name] for name in inputs)) if by_input.keys() >= set(inputs) else None


def _names(parts: Parts) -> tuple[str, str, str]:
    return (parts.tokenize, parts.generate, parts.detokenize)


def _prompt(prompt: Prompt) -> dict[TensorSpec, object]:
    given: dict[TensorSpec, object | None] = {
        tensors.TEXT_INPUT: prompt.text, tensors.INPUT_IDS: prompt.input_ids, tensors.MESSAGES: prompt.messages
    }  # fmt: skip
    return {spec: value for spec, value in given.items() if value is not None}


def _trace(traceparent: str) -> tuple[tuple[str, str], ...]:
    """What tells Triton itself which trace a call belongs to."""
    return ((TRACEPARENT, traceparent),) if traceparent else ()
