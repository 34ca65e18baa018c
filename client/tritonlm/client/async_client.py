"""`AsyncClient`: language models on one or several Tritons, called as with OpenAI's library.

It knows calls, retries and which Triton to ask; what crosses the connection is the transport's matter, what OpenAI's
objects look like `results`'. `sync.Client` is the same with blocking calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tritonlm.client.calls import Chat, Completions, EmbeddingCalls
from tritonlm.client.choice import Choice
from tritonlm.client.models import Models, look
from tritonlm.client.observer import Observer, Told
from tritonlm.client.resume import Tries
from tritonlm.client.sequences import Plan, completion_plan, read_prompts
from tritonlm.client.stream import AsyncStream, Merged
from tritonlm.client.transport import Call, Embedded, Prompt, Transport
from tritonlm.client.types import CompletionUsage, Health, Piece
from tritonlm.contract import Draining, InvalidRequest, ModelNotFound, NotLoaded, TritonLMError, Unavailable
from tritonlm.contract.control import ABOUT, CANCEL, FIND, STATUS, Command
from tritonlm.contract.tensors import INPUT_IDS, TEXT_INPUT

T = TypeVar("T")
DEFAULT_URL = "127.0.0.1:8001"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 2.0
REPAIR_SECONDS = 30.0
# How long a Triton that has failed may take for a sign of life.
_SIGN_SECONDS = 1.0
# Puts a model that is not loaded back, or waits until somebody else has.
Revive = Callable[[str], Awaitable[None]]


class AsyncClient:
    """A context; or call `close`."""

    def __init__(
        self,
        urls: str | Sequence[str] = DEFAULT_URL,
        *,
        timeout: float = 600.0,
        connect_timeout: float = 5.0,
        max_retries: int = 2,
        repair_seconds: float = REPAIR_SECONDS,
        authorities: str | Path | None = None,
        transports: Sequence[Transport] | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`urls`: HOST:PORT, or grpcs://HOST:PORT, encrypted; `authorities` is a file of certificates for that.
        `repair_seconds`: how long a call waits for a Triton that has broken under it, to go on where it was.
        `observer` is told of sequences' texts, ends and tries."""
        if transports is None:
            from tritonlm.client.transport.grpc_transport import GrpcTransport  # noqa: PLC0415 (tests bring their own)

            addresses = [urls] if isinstance(urls, str) else list(urls)
            vouched = None if authorities is None else Path(authorities).read_bytes()
            transports = [GrpcTransport(address, connect_timeout, vouched) for address in addresses]
        if not transports:
            raise ValueError("urls must name at least one Triton, such as 127.0.0.1:8001")
        self._transports = list(transports)
        self._choice = Choice(self._transports)
        self._observer = observer or Observer()
        self._timeout, self._max_retries, self._repair_seconds = timeout, max_retries, repair_seconds
        # For calls that find their model gone after a fault.
        self.revive: Revive | None = None
        # Calls under way by their id: which Triton has which sequence.
        self._running: dict[str, dict[str, Transport]] = {}
        self._models_of_running: dict[str, str] = {}
        self.completions = Completions(self)
        self.chat = Chat(self)
        self.embeddings = EmbeddingCalls(self)
        self.models = Models(self._transports)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.gather(*(transport.close() for transport in self._transports))

    async def generate(
        self, model: str, prompt: str | Sequence[int], *, request_id: str | None = None, timeout: float | None = None,
        **parameters: Any,
    ) -> AsyncStream[Piece]:  # fmt: skip
        """The pieces of one answer, as the engine gives them: text, ids, log-probabilities, usage."""
        plan = completion_plan(
            model, prompt, stream=True, request_id=request_id, timeout=timeout or self._timeout, **parameters
        )
        if len(plan.calls) != 1:
            raise InvalidRequest("generate takes one prompt; use completions.create for several", "prompt")
        return await self._stream(plan, lambda _, piece: piece, lambda: None)

    async def cancel(self, request_id: str, model: str | None = None) -> int:
        """End a call of this client by its id; or, with the model, an engine's request by its own id."""
        if found := self._running.get(request_id):
            owner = self._models_of_running[request_id]
            cancels = [self._cancel(transport, owner, sequence) for sequence, transport in found.items()]
        elif model is not None:
            cancels = [self._cancel(transport, model, request_id) for transport in self._transports]
        else:
            return 0
        return sum(await asyncio.gather(*cancels))

    async def _cancel(self, transport: Transport, model: str, request_id: str) -> int:
        return int((await transport.command(model, Command(CANCEL, request_id)))["cancelled"])

    async def status(self, model: str) -> dict[str, Any]:
        """The counters of the LM's engine: places, running, waiting, blocks …"""
        return await self._anywhere(lambda transport: transport.command(model, Command(STATUS)))

    async def about(self, model: str) -> dict[str, Any]:
        """The LM's checkpoint: architecture, sizes, special tokens, chat template, training record."""
        return await self._anywhere(lambda transport: transport.command(model, Command(ABOUT)))

    async def progress(self, request_id: str) -> list[dict[str, Any]]:
        """Where the sequences of a call of this client are: running or waiting, position, tokens so far."""
        found = dict(self._running.get(request_id, {}))
        model = self._models_of_running.get(request_id, "")
        reports = await asyncio.gather(
            *(transport.command(model, Command(FIND, sequence)) for sequence, transport in found.items())
        )
        return [entry for report in reports for entry in report["requests"]]

    async def tokenize(self, model: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text's token ids, of any number: more than the context holds are told all the same."""
        prompt = Prompt(text=text)
        return await self._anywhere(lambda transport: transport.tokenize(model, prompt, add_special_tokens))

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        (prompt,) = read_prompts(list(ids), "ids")
        if prompt.input_ids is None:
            raise InvalidRequest("ids must be a list of token ids", "ids")
        found = prompt.input_ids
        return await self._anywhere(lambda transport: transport.detokenize(model, found))

    async def health(self) -> Health:
        """Whether a Triton answers, and which LMs do: all three processes of each, anywhere."""
        live = await asyncio.gather(*(transport.is_live() for transport in self._transports))
        living = [transport for transport, lives in zip(self._transports, live, strict=True) if lives]
        looks = await asyncio.gather(*map(look, living))
        well = {name for answering, _ in looks for name in answering}
        silent = {name for _, others in looks for name in others} - well
        return Health(live=any(live), ready=bool(well) and not silent, models=sorted(well), silent=sorted(silent))

    # What the namespaces share.

    async def _whole(self, plan: Plan) -> list[list[Piece]]:
        """All answers, complete. The first error ends the others."""
        merged = await self._start(plan)
        answers: list[list[Piece]] = [[] for _ in plan.calls]
        try:
            while (found := await merged.next()) is not None:
                answers[found[0]].append(found[1])
        finally:
            self._forget(plan)
            await merged.close()
        return answers

    async def _stream(
        self,
        plan: Plan,
        make: Callable[[int, Piece], T],
        at_end: Callable[[], T | None],
        usage: Callable[[], CompletionUsage | None] = lambda: None,
    ) -> AsyncStream[T]:
        merged = await self._start(plan)
        return AsyncStream(plan.id, merged, make, at_end, lambda: self._forget(plan), usage)

    async def _start(self, plan: Plan) -> Merged:
        self._running[plan.id] = {}
        self._models_of_running[plan.id] = plan.model
        merged = Merged([self._pieces(plan, call) for call in plan.calls])
        try:
            await merged.start()
        except BaseException:
            self._forget(plan)
            await merged.close()
            raise
        return merged

    def _forget(self, plan: Plan) -> None:
        self._running.pop(plan.id, None)
        self._models_of_running.pop(plan.id, None)

    async def _pieces(self, plan: Plan, call: Call) -> AsyncGenerator[Piece, None]:
        """One sequence's pieces; after a fault, from another try that goes on where the last one was."""
        tries = Tries(call, self._max_retries, self._repair_seconds)
        told = Told(self._observer, call)
        transport: Transport | None = None
        while True:
            transport, asked = await self._living(call, transport), tries.next_call()
            running = self._running.get(plan.id, {})
            running[asked.request_id] = transport
            self._choice.begin(transport)
            source = transport.generate(asked)
            try:
                async for piece in source:
                    self._choice.answered(transport)
                    piece = tries.take(piece)  # noqa: PLW2901 (the same, as one of the whole sequence)
                    told.piece(piece)
                    yield piece
                return
            except InvalidRequest as error:
                raise _in_our_words(error) from None
            except TritonLMError as error:
                pause = self._pause_after(error, transport, tries)
                missing = isinstance(error, (ModelNotFound, NotLoaded))
                told.error(error)
            finally:
                self._choice.end(transport)
                running.pop(asked.request_id, None)
                await source.aclose()
            if missing and self.revive is not None:
                await self.revive(call.model)
            await asyncio.sleep(pause)

    async def _embed(self, call: Call) -> Embedded:
        """One prompt's embedding; after a fault, from another try."""
        tries = Tries(call, self._max_retries, self._repair_seconds)
        transport: Transport | None = None
        while True:
            transport = await self._living(call, transport)
            try:
                found = await transport.embed(tries.next_call())
            except TritonLMError as error:
                pause = self._pause_after(error, transport, tries)
            else:
                self._choice.answered(transport)
                return found
            await asyncio.sleep(pause)

    def _pause_after(self, error: TritonLMError, transport: Transport, tries: Tries) -> float:
        """How long to wait before the next try; raises the error where there is none."""
        lately = self._choice.answered_lately()
        if isinstance(error, (Unavailable, Draining)):
            self._choice.failed(transport)
        return tries.after(error, lately)

    async def _living(self, call: Call, after: Transport | None) -> Transport:
        """The Triton to ask; of those that have failed, one that gives a sign of life first, where there is any."""
        for _ in self._transports:
            transport = self._choice.next(call, after)
            if not self._choice.has_failed(transport):
                break
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                if await asyncio.wait_for(transport.is_live(), _SIGN_SECONDS):
                    break
            self._choice.failed(transport)
        return transport

    async def _anywhere(self, ask: Callable[[Transport], Awaitable[T]]) -> T:
        """A small question, to the next Triton that answers it."""
        for attempt in itertools.count():
            transport = self._choice.next()
            try:
                return await ask(transport)
            except Unavailable:
                self._choice.failed(transport)
                if attempt >= self._max_retries:
                    raise
            await asyncio.sleep(min(_FIRST_PAUSE_SECONDS * 2.0**attempt, _LONGEST_PAUSE_SECONDS))
        raise AssertionError("unreachable")


def _in_our_words(error: InvalidRequest) -> InvalidRequest:
    """Triton's inputs have other names than the arguments that they came from."""
    if error.param in (TEXT_INPUT.name, INPUT_IDS.name):
        return type(error)(error.message.replace(error.param, "prompt", 1), "prompt")
    return error
