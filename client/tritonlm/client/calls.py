"""OpenAI's calls: `completions`, `chat.completions`, `embeddings`.

Each turns its arguments into a plan (`sequences`), has the client run it, and builds OpenAI's objects (`results`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload

from tritonlm.client.embeddings import build_embeddings, read_inputs
from tritonlm.client.results import ChatBuilder, CompletionBuilder
from tritonlm.client.sequences import Plan, PromptArgument, chat_plan, completion_plan
from tritonlm.client.stream import AsyncStream
from tritonlm.client.transport import Call, PromptEmbedding
from tritonlm.client.types import ChatCompletion, ChatCompletionChunk, Completion, CompletionUsage, Embeddings, Piece
from tritonlm.contract import InvalidRequest
from tritonlm.contract.tensors import INPUT_IDS, TEXT_INPUT

T = TypeVar("T")


class Caller(Protocol):
    """The part of a client that the calls use: run a plan to its end or as a stream, and embed a prompt."""

    _timeout: float

    async def _complete(self, plan: Plan) -> list[list[Piece]]: ...

    async def _stream(
        self,
        plan: Plan,
        make: Callable[[int, Piece], T],
        at_end: Callable[[], T | None],
        usage: Callable[[], CompletionUsage | None] = ...,
    ) -> AsyncStream[T]: ...

    async def _embed(self, call: Call) -> PromptEmbedding: ...


class Completions:
    def __init__(self, client: Caller) -> None:
        self._client = client

    async def create(
        self, model: str, prompt: PromptArgument, **arguments: Any
    ) -> Completion | AsyncStream[Completion]:
        """As OpenAI's: n, best_of, echo, logprobs, stop, stream, stream_options …, and every sampling parameter."""
        plan = completion_plan(model, prompt, **_with_timeout(self._client, arguments))
        builder = CompletionBuilder(plan)
        if plan.stream:
            return await self._client._stream(plan, builder.chunk, _usage_at_end(plan, builder), lambda: builder.usage)
        return builder.build(await self._client._complete(plan))


class Chat:
    def __init__(self, client: Caller) -> None:
        self.completions = ChatCompletions(client)


class ChatCompletions:
    def __init__(self, client: Caller) -> None:
        self._client = client

    async def create(
        self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """As OpenAI's, with the checkpoint's chat template; raises NotOffered if it has none."""
        plan = chat_plan(model, messages, **_with_timeout(self._client, arguments))
        builder = ChatBuilder(plan)
        if plan.stream:
            return await self._client._stream(plan, builder.chunk, _usage_at_end(plan, builder), lambda: builder.usage)
        return builder.build(await self._client._complete(plan))


def _with_timeout(client: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments if arguments.get("timeout") is not None else {**arguments, "timeout": client._timeout}


class EmbeddingCalls:
    def __init__(self, client: Caller) -> None:
        self._client = client

    async def create(
        self,
        model: str,
        input: Any,  # noqa: A002 (OpenAI's name)
        *,
        encoding_format: str | None = None,
        dimensions: int | None = None,
        user: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Normalized mean of the last hidden states; raises NotOffered if the server has embeddings switched off."""
        prompts, encoding = read_inputs(input, encoding_format, dimensions, user)
        root = f"embd-{request_id or ''}-{secrets.token_hex(4)}"
        calls = [
            Call(model, f"{root}-{index}", prompt, timeout=timeout or self._client._timeout)
            for index, prompt in enumerate(prompts)
        ]
        # The first error cancels the others.
        tasks = [asyncio.ensure_future(self._embed(call)) for call in calls]
        try:
            embeddings = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return build_embeddings(model, embeddings, encoding)

    async def _embed(self, call: Call) -> PromptEmbedding:
        try:
            return await self._client._embed(call)
        except InvalidRequest as error:
            if error.param in (TEXT_INPUT.name, INPUT_IDS.name, "prompt"):
                raise type(error)(error.message.replace(error.param, "input", 1), "input") from None
            raise


@overload
def _usage_at_end(plan: Plan, builder: CompletionBuilder) -> Callable[[], Completion | None]: ...
@overload
def _usage_at_end(plan: Plan, builder: ChatBuilder) -> Callable[[], ChatCompletionChunk | None]: ...
def _usage_at_end(plan: Plan, builder: CompletionBuilder | ChatBuilder) -> Callable[[], Any]:
    return lambda: builder.usage_chunk() if plan.include_usage else None
