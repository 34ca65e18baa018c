"""One Triton over gRPC: one channel, one bidirectional stream per request.

When a caller leaves a stream early, the transport sends the engine a cancel, since Triton does not tell a running
ensemble that its caller is gone. The cancel and the draining of the stream run in the background, with a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from functools import cached_property
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tritonlm.client.types import Piece
from tritonlm.contract import (
    Broken,
    Chunk,
    GenerationRequest,
    SamplingParameters,
    TimedOut,
    TritonLMError,
    Unavailable,
    tensors,
)
from tritonlm.contract.control import CANCEL, KNOWN, MAX_IDS, PING, Command
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import TensorSpec
from tritonlm.observability.tracing import TRACEPARENT

from . import Call, Prompt, PromptEmbedding, RepositoryModel
from .grpc_stream import GrpcStream, grpc_errors, single_request
from .repository import Repository
from .watch import Watch, WatchedCall
from .wire import Outputs, infer_request, piece_of

_COMMAND_SECONDS = 5.0
# The engine enforces a request's time limit itself; this margin covers a Triton that has stopped answering.
_GRACE_SECONDS = 10.0
_ABANDON_SECONDS = 30.0
# A stream whose request was cancelled or lost by the engine ends within this time or never.
_LOST_SECONDS = 3.0
_FIRST_CANCEL_SECONDS, _LAST_CANCEL_SECONDS = 0.02, 1.0
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class GrpcTransport:
    def __init__(self, url: str, connect_timeout: float, authorities: bytes | None = None) -> None:
        """grpcs://HOST:PORT uses TLS; `authorities` are the CA certificates (default: the system's)."""
        self.url = url
        self._connect_timeout, self._authorities = connect_timeout, authorities
        self._background: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._watches: dict[str, Watch] = {}

    # Made by the first call: a channel belongs to an event loop, and a client may be made before there is one.
    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        scheme, _, rest = self.url.rpartition("://")
        # The time limit of one connection attempt; by default a host that does not answer blocks a call for 20 s.
        options = [*_OPTIONS, ("grpc.min_reconnect_backoff_ms", round(self._connect_timeout * 1000))]
        if scheme == "grpcs":
            credentials = grpc.ssl_channel_credentials(self._authorities)
            return grpc.aio.secure_channel(rest, credentials, options=options)
        return grpc.aio.insecure_channel(rest, options=options)

    @cached_property
    def _stub(self) -> Any:
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @cached_property
    def _repository(self) -> Repository:
        return Repository(self._stub, self.url)

    async def close(self) -> None:
        """Wait for the running cancels, then close the channel."""
        for watch in self._watches.values():
            watch.close()
        if self._background:
            await asyncio.wait(self._background, timeout=_ABANDON_SECONDS)
        self._is_closed = True
        await self._channel.close()

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        inputs = {**_prompt(call.prompt), tensors.STREAM: call.stream, tensors.EXCLUDE_INPUT: True}
        inputs[tensors.SAMPLING_PARAMETERS] = json.dumps({**call.parameters, "timeout": call.timeout, "as_piece": True})
        request = infer_request(call.model, inputs, [tensors.PIECE], call.request_id, call.traceparent)
        stream = GrpcStream(
            self._stub.ModelStreamInfer(
                single_request(request),
                timeout=call.timeout + _GRACE_SECONDS,
                metadata=_trace_metadata(call.traceparent),
            )
        )
        ended, watched, abandon_seconds = False, WatchedCall(call.request_id, stream.fail), _ABANDON_SECONDS
        self._watch(call.model).add(watched)
        try:
            with grpc_errors(self.url):
                while (message := await stream.next()) is not None:
                    if message.error_message:
                        raise from_wire(message.error_message)
                    watched.note_response()
                    piece = piece_of(message.infer_response)
                    ended = bool(piece.finish_reason)
                    yield piece
                    if ended:
                        return
                ended = True
                raise Broken(f"Triton at {self.url} ended the stream before the end of the sequence")
        except TritonLMError as error:
            # After a timeout or a lost process the engine may still run the request.
            ended = ended or not isinstance(error, (TimedOut, Broken))
            abandon_seconds = _LOST_SECONDS if isinstance(error, Broken) else _ABANDON_SECONDS
            raise
        finally:
            self._unwatch(call.model, watched)
            if not ended:
                self._run_in_background(self._abandon(call, stream, abandon_seconds))

    async def embed(self, call: Call) -> PromptEmbedding:
        """Calls `generate` directly, since the ensemble has no output for an embedding."""
        ids, parts = await self.tokenize(call.model, call.prompt), await self._repository.parts_of(call.model)
        adapter = call.parameters.get("adapter", "")
        parameters = SamplingParameters(max_tokens=0, echo=True, seed=0, timeout=call.timeout, adapter=adapter)
        generation = GenerationRequest(parameters, embed=True).to_json()
        request = infer_request(
            parts.generate,
            {tensors.PROMPT_IDS: ids, tensors.REQUEST: generation},
            [tensors.EMBEDDING, tensors.USAGE],
            call.request_id,
            call.traceparent,
        )
        stream = GrpcStream(self._stub.ModelStreamInfer(single_request(request), timeout=call.timeout + _GRACE_SECONDS))
        ended, watched = False, WatchedCall(call.request_id, stream.fail)
        self._watch(call.model).add(watched)
        try:
            with grpc_errors(self.url):
                while (message := await stream.next()) is not None:
                    ended = True
                    if message.error_message:
                        raise from_wire(message.error_message)
                    outputs = Outputs(message.infer_response)
                    vector = [float(value) for value in outputs.numbers(tensors.EMBEDDING)]
                    return PromptEmbedding(vector, outputs.numbers(tensors.USAGE)[0])
            raise Broken(f"Triton at {self.url} ended the stream without an embedding")
        finally:
            self._unwatch(call.model, watched)
            if not ended:
                self._run_in_background(self._abandon(call, stream))

    def _watch(self, model: str) -> Watch:
        if model not in self._watches:

            async def filter_known(request_ids: Sequence[str]) -> list[str]:
                # Ids beyond the limit of one command count as known until a later check.
                command = Command(KNOWN, request_ids=tuple(request_ids[:MAX_IDS]))
                known: list[str] = (await self.command(model, command))["known"]
                return [*known, *request_ids[MAX_IDS:]]

            self._watches[model] = Watch(model, lambda: self.ping(model), filter_known)
        return self._watches[model]

    def _unwatch(self, model: str, watched: WatchedCall) -> None:
        watch = self._watches[model]
        watch.remove(watched)
        if watch.is_idle:
            # Model names come from callers, so unused entries must not accumulate.
            watch.close()
            del self._watches[model]

    async def ping(self, model: str) -> dict[str, Any]:
        others = asyncio.gather(self.tokenize(model, Prompt(input_ids=(0,))), self.detokenize(model, [0]))
        report: dict[str, Any] = (await asyncio.gather(self.command(model, Command(PING)), others))[0]
        return report

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        if self._is_closed:
            # The channel's end has ended its streams, and takes no cancel.
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _abandon(self, call: Call, stream: GrpcStream, seconds: float = _ABANDON_SECONDS) -> None:
        """Send cancels until the stream has ended: the first one may reach the engine before the request does."""
        drained = asyncio.ensure_future(stream.drain())
        clock = asyncio.get_running_loop().time
        pause, deadline = _FIRST_CANCEL_SECONDS, clock() + seconds
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
        parts = await self._repository.parts_of(model)
        request = infer_request(parts.generate, {tensors.CONTROL: command.to_json()}, [tensors.REPORT])
        with grpc_errors(self.url):
            async for message in self._stub.ModelStreamInfer(single_request(request), timeout=_COMMAND_SECONDS):
                if message.error_message:
                    raise from_wire(message.error_message)
                report: dict[str, Any] = json.loads(Outputs(message.infer_response).text(tensors.REPORT))
                return report
        raise Unavailable(f"the engine of {model!r} at {self.url} did not answer the command {command.name!r}")

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        parts = await self._repository.parts_of(model)
        # Without the output `request`, tokenize does not check the prompt's length.
        inputs = _prompt(prompt)
        if not add_special_tokens:
            inputs[tensors.SAMPLING_PARAMETERS] = json.dumps({"add_special_tokens": False})
        return (await self._infer(parts.tokenize, inputs, tensors.PROMPT_IDS)).numbers(tensors.PROMPT_IDS)

    async def render(self, model: str, prompt: Prompt) -> str:
        parts, output = await self._repository.parts_of(model), tensors.RENDERED_PROMPT
        return (await self._infer(parts.tokenize, _prompt(prompt), output)).text(output)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        parts = await self._repository.parts_of(model)
        chunk = Chunk(0, list(ids), len(ids), 0, 0, skip_special_tokens=False)
        inputs: dict[TensorSpec, object] = {tensors.CHUNK: chunk.to_json()}
        return (await self._infer(parts.detokenize, inputs, tensors.TEXT_OUTPUT)).text(tensors.TEXT_OUTPUT)

    async def _infer(self, model: str, inputs: Mapping[TensorSpec, object], output: TensorSpec) -> Outputs:
        with grpc_errors(self.url):
            return Outputs(
                await self._stub.ModelInfer(infer_request(model, inputs, [output]), timeout=_COMMAND_SECONDS)
            )

    async def models(self) -> list[RepositoryModel]:
        return await self._repository.models()

    async def load(self, model: str, timeout: float) -> None:
        await self._repository.load(model, timeout)

    async def unload(self, model: str) -> None:
        await self._repository.unload(model)

    async def is_live(self) -> bool:
        try:
            response = await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=self._connect_timeout)
        except grpc.RpcError:
            return False
        return bool(response.live)


def _prompt(prompt: Prompt) -> dict[TensorSpec, object]:
    inputs: dict[TensorSpec, object | None] = {
        tensors.TEXT_INPUT: prompt.text, tensors.INPUT_IDS: prompt.input_ids, tensors.MESSAGES: prompt.messages
    }  # fmt: skip
    return {spec: value for spec, value in inputs.items() if value is not None}


def _trace_metadata(traceparent: str) -> tuple[tuple[str, str], ...]:
    """The metadata that assigns Triton's own spans to the call's trace."""
    return ((TRACEPARENT, traceparent),) if traceparent else ()
