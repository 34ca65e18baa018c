"""`AsyncClient`: language models on one or several Tritons, called as with OpenAI's library.

This module runs calls and resumes their sequences. `retries` chooses a Triton for each attempt, `transport` handles
connections, `results` builds OpenAI's objects. `sync.Client` is the same client with blocking calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tritonlm.client.calls import Chat, Completions, EmbeddingCalls
from tritonlm.client.chat_parsing.profile import ChatProfile
from tritonlm.client.chat_parsing.response_template import is_installed
from tritonlm.client.messages_api.calls import Messages
from tritonlm.client.model_names import ModelNames
from tritonlm.client.models import Models, probe
from tritonlm.client.observer import Observer, SequenceReporter
from tritonlm.client.responses_api.calls import Responses
from tritonlm.client.retries import Retries
from tritonlm.client.sequences import Plan, completion_plan, read_prompts
from tritonlm.client.stream import AsyncStream, MergedSources
from tritonlm.client.transport import Call, Prompt, PromptEmbedding, Transport
from tritonlm.client.types import CompletionUsage, Health, Piece
from tritonlm.contract import InvalidRequest, ModelNotFound, NotLoaded, TritonLMError
from tritonlm.contract.control import ABOUT, CANCEL, FIND, STATUS, Command
from tritonlm.contract.structured_outputs import check_unicode
from tritonlm.contract.tensors import INPUT_IDS, TEXT_INPUT

T = TypeVar("T")
DEFAULT_URL = "127.0.0.1:8001"
REPAIR_SECONDS = 30.0
# A model may be replaced by another one of the same name.
_PROFILE_SECONDS = 30.0
# Loads a model that is missing after a fault, or waits until it is loaded.
Revive = Callable[[str], Awaitable[None]]


class AsyncClient:
    """Use it as an async context manager, or call `close`."""

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
        adapters_folder: Path | None = None,
    ) -> None:
        """`urls`: HOST:PORT, or grpcs://HOST:PORT for TLS; `authorities` is a file of CA certificates for TLS.
        `repair_seconds`: how long a call waits for a Triton that broke during the call, in order to resume it.
        `observer` receives the events of all sequences. `adapters_folder` holds the adapters files of this machine's
        server; with it an adapter's name alone is a model, and `LM:ADAPTER` always is."""
        if transports is None:
            from tritonlm.client.transport.grpc_transport import GrpcTransport  # noqa: PLC0415 (tests pass their own)

            addresses = [urls] if isinstance(urls, str) else list(urls)
            certificates = None if authorities is None else Path(authorities).read_bytes()
            transports = [GrpcTransport(address, connect_timeout, certificates) for address in addresses]
        if not transports:
            raise ValueError("urls must name at least one Triton, such as 127.0.0.1:8001")
        self._transports = list(transports)
        self.names = ModelNames(adapters_folder)
        self._retries = Retries(self._transports, max_retries, repair_seconds)
        self._observer = observer or Observer()
        self._timeout = timeout
        # Called when a call finds its model missing after a fault.
        self.revive: Revive | None = None
        # Running calls by id: the Triton of each sequence, and the model.
        self._running: dict[str, dict[str, Transport]] = {}
        self._running_models: dict[str, str] = {}
        self.completions = Completions(self)
        self.chat = Chat(self)
        self.embeddings = EmbeddingCalls(self)
        self.responses = Responses(self.chat.completions)
        self.messages = Messages(self.chat.completions)
        self.models = Models(self._transports, self.names)
        self._chat_profiles: dict[str, tuple[float, ChatProfile]] = {}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel the running calls: an engine does not learn from Triton that its caller is gone."""
        await asyncio.gather(*map(self.cancel, list(self._running)), return_exceptions=True)
        await asyncio.gather(*(transport.close() for transport in self._transports))

    async def generate(
        self, model: str, prompt: str | Sequence[int], *, request_id: str | None = None, timeout: float | None = None,
        **parameters: Any,
    ) -> AsyncStream[Piece]:  # fmt: skip
        """Stream the pieces of one sequence: text, ids, log-probabilities, usage."""
        plan = completion_plan(
            self.names.resolve(model),
            prompt,
            stream=True,
            request_id=request_id,
            timeout=timeout or self._timeout,
            **parameters,
        )
        if len(plan.calls) != 1:
            raise InvalidRequest("generate takes one prompt; use completions.create for several", "prompt")
        return await self._stream(plan, lambda _, piece: piece, lambda: None)

    async def cancel(self, request_id: str, model: str | None = None) -> int:
        """Cancel a call of this client by its id; or, with the model, an engine's request by its own id."""
        if sequences := self._running.get(request_id):
            owner = self._running_models[request_id]
            cancels = [self._cancel(transport, owner, sequence) for sequence, transport in sequences.items()]
        elif model is not None:
            lm = self.names.resolve(model).lm
            cancels = [self._cancel(transport, lm, request_id) for transport in self._transports]
        else:
            return 0
        return sum(await asyncio.gather(*cancels))

    async def _cancel(self, transport: Transport, model: str, request_id: str) -> int:
        return int((await transport.command(model, Command(CANCEL, request_id)))["cancelled"])

    async def status(self, model: str) -> dict[str, Any]:
        """The counters of the LM's engine: slots, running, waiting, blocks …"""
        lm = self.names.resolve(model).lm
        return await self._retries.on_any(lambda transport: transport.command(lm, Command(STATUS)))

    async def about(self, model: str) -> dict[str, Any]:
        """The LM's checkpoint: architecture, sizes, special tokens, chat template, training record."""
        lm = self.names.resolve(model).lm
        return await self._retries.on_any(lambda transport: transport.command(lm, Command(ABOUT)))

    async def progress(self, request_id: str) -> list[dict[str, Any]]:
        """The state of a call's sequences: running or waiting, position, tokens so far."""
        sequences = dict(self._running.get(request_id, {}))
        model = self._running_models.get(request_id, "")
        reports = await asyncio.gather(
            *(transport.command(model, Command(FIND, sequence)) for sequence, transport in sequences.items())
        )
        return [entry for report in reports for entry in report["requests"]]

    async def tokenize(self, model: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text's token ids. The text may be longer than the context."""
        check_unicode("text", text)
        lm, prompt = self.names.resolve(model).lm, Prompt(text=text)
        return await self._retries.on_any(lambda transport: transport.tokenize(lm, prompt, add_special_tokens))

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        (prompt,) = read_prompts(list(ids), "ids")
        if prompt.input_ids is None:
            raise InvalidRequest("ids must be a list of token ids", "ids")
        lm, input_ids = self.names.resolve(model).lm, prompt.input_ids
        # A tokenizer leaves such ids out of the text.
        vocab_size = (await self.about(model))["vocab_size"]
        if (outside := max(input_ids)) >= vocab_size:
            raise InvalidRequest.for_token("ids", outside, vocab_size)
        return await self._retries.on_any(lambda transport: transport.detokenize(lm, input_ids))

    async def health(self) -> Health:
        """Whether a Triton answers, and which LMs do. An LM answers if all three of its processes do."""
        live = await asyncio.gather(*(transport.is_live() for transport in self._transports))
        reachable = [transport for transport, is_live in zip(self._transports, live, strict=True) if is_live]
        probes = await asyncio.gather(*map(probe, reachable))
        healthy = {name for answering, _ in probes for name in answering}
        silent = {name for _, others in probes for name in others} - healthy
        return Health(live=any(live), ready=bool(healthy) and not silent, models=sorted(healthy), silent=sorted(silent))

    # Shared by the namespaces `completions`, `chat` and `embeddings`.

    async def _complete(self, plan: Plan) -> list[list[Piece]]:
        """The pieces of all sequences. The first error cancels the others."""
        merged = await self._start(plan)
        sequences: list[list[Piece]] = [[] for _ in plan.calls]
        try:
            while (item := await merged.next()) is not None:
                sequence, piece = item
                sequences[sequence].append(piece)
        finally:
            self._forget(plan)
            await merged.close()
        return sequences

    async def _stream(
        self,
        plan: Plan,
        make: Callable[[int, Piece], T | None],
        at_end: Callable[[], T | None],
        usage: Callable[[], CompletionUsage | None] = lambda: None,
    ) -> AsyncStream[T]:
        merged = await self._start(plan)
        return AsyncStream(plan.id, merged, make, at_end, lambda: self._forget(plan), usage)

    async def _start(self, plan: Plan) -> MergedSources:
        self._running[plan.id] = {}
        self._running_models[plan.id] = plan.model.lm
        merged = MergedSources([self._pieces(plan, call) for call in plan.calls])
        try:
            await merged.start()
        except BaseException:
            self._forget(plan)
            await merged.close()
            raise
        return merged

    def _forget(self, plan: Plan) -> None:
        self._running.pop(plan.id, None)
        self._running_models.pop(plan.id, None)

    async def _pieces(self, plan: Plan, call: Call) -> AsyncGenerator[Piece, None]:
        """One sequence's pieces. After a fault, the next attempt resumes the sequence."""
        attempts = self._retries.attempts(call)
        reporter = SequenceReporter(self._observer, call)
        transport: Transport | None = None
        while True:
            transport, attempt = await self._retries.healthy_transport(call, transport), attempts.next_call()
            running = self._running.get(plan.id, {})
            running[attempt.request_id] = transport
            self._retries.balancer.call_started(transport)
            source = transport.generate(attempt)
            try:
                async for piece in source:
                    self._retries.balancer.mark_healthy(transport)
                    piece = attempts.accept(piece)  # noqa: PLW2901 (the same piece, renumbered)
                    reporter.piece(piece)
                    yield piece
                return
            except InvalidRequest as error:
                raise _with_argument_name(error) from None
            except TritonLMError as error:
                pause = self._retries.pause_after(error, transport, attempts)
                missing = isinstance(error, (ModelNotFound, NotLoaded))
                reporter.error(error)
            finally:
                self._retries.balancer.call_ended(transport)
                running.pop(attempt.request_id, None)
                await source.aclose()
            if missing and self.revive is not None:
                await self.revive(call.model)
            await asyncio.sleep(pause)

    async def _embed(self, call: Call) -> PromptEmbedding:
        """One prompt's embedding. After a fault it is computed again."""
        return await self._retries.repeat(call, lambda transport, attempt: transport.embed(attempt))

    async def _chat_profile(self, model: str) -> ChatProfile:
        """How the LM's checkpoint writes its answers. It is asked for anew from time to time, because a model may be
        replaced."""
        made, profile = self._chat_profiles.get(model, (0.0, None))
        now = time.monotonic()
        if profile is None or now - made > _PROFILE_SECONDS:
            about = await self._retries.repeat(
                Call(model, "about", Prompt()), lambda transport, _: transport.command(model, Command(ABOUT))
            )
            profile = ChatProfile.of(about)
            if profile.response_template is not None:
                # The import of its parser takes too long for the event loop.
                await asyncio.to_thread(is_installed)
            self._chat_profiles[model] = now, profile
        return profile

    async def _render(self, model: str, chat: str) -> str:
        prompt = Prompt(messages=chat)
        return await self._retries.repeat(
            Call(model, "render", prompt), lambda transport, _: transport.render(model, prompt)
        )


def _with_argument_name(error: InvalidRequest) -> InvalidRequest:
    """Replace the name of Triton's input with that of the client's argument."""
    if error.param in (TEXT_INPUT.name, INPUT_IDS.name):
        return type(error)(error.message.replace(error.param, "prompt", 1), "prompt")
    return error
