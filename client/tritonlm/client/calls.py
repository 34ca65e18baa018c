"""OpenAI's calls: `completions`, `chat.completions`, `embeddings`.

Each turns its arguments into a plan (`sequences`), has the client run it, and builds OpenAI's objects (`results`). It
does not know which Triton runs the plan, nor in how many attempts.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, overload

from tritonlm.client.chat_parsing.profile import ChatProfile
from tritonlm.client.chat_results import ChatBuilder
from tritonlm.client.chats import take_chat, with_argument_name
from tritonlm.client.embeddings import build_embeddings, read_inputs
from tritonlm.client.model_names import ModelNames
from tritonlm.client.parsing import M, ParsedChatCompletion, parse_answers, response_format_of
from tritonlm.client.results import CompletionBuilder
from tritonlm.client.sequences import Plan, PromptArgument, chat_plan, completion_plan, in_timed_parts, read_parameters
from tritonlm.client.stream import AsyncStream
from tritonlm.client.transport import Call, PromptEmbedding
from tritonlm.client.types import ChatCompletion, ChatCompletionChunk, Completion, CompletionUsage, Embeddings, Piece
from tritonlm.contract import InvalidRequest
from tritonlm.contract.structured_outputs import with_sent_name
from tritonlm.contract.tensors import INPUT_IDS, TEXT_INPUT

T = TypeVar("T")


class Caller(Protocol):
    """The part of a client that the calls use: run a plan to its end or as a stream, and embed a prompt."""

    _timeout: float
    names: ModelNames

    async def _complete(self, plan: Plan) -> list[list[Piece]]: ...

    async def _stream(
        self,
        plan: Plan,
        make: Callable[[int, Piece], T | None],
        at_end: Callable[[], T | None],
        usage: Callable[[], CompletionUsage | None] = ...,
    ) -> AsyncStream[T]: ...

    async def _embed(self, call: Call) -> PromptEmbedding: ...

    async def _chat_profile(self, model: str) -> ChatProfile: ...

    async def _render(self, model: str, chat: str) -> str: ...

    async def tokenize(self, model: str, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    async def status(self, model: str) -> dict[str, Any]: ...


class Completions:
    def __init__(self, client: Caller) -> None:
        self._client = client

    async def create(
        self, model: str, prompt: PromptArgument, **arguments: Any
    ) -> Completion | AsyncStream[Completion]:
        """As OpenAI's: n, best_of, echo, logprobs, stop, stream, stream_options …, and every sampling parameter."""
        served = self._client.names.resolve(model)
        plan = completion_plan(served, prompt, **_with_timeout(self._client, arguments))
        builder = CompletionBuilder(plan)
        try:
            if not plan.stream:
                return builder.build(await self._client._complete(plan))
            return await self._client._stream(plan, builder.chunk, _usage_at_end(plan, builder), lambda: builder.usage)
        except InvalidRequest as error:
            raise with_sent_name(error, arguments) from None


class Chat:
    def __init__(self, client: Caller) -> None:
        self.completions = ChatCompletions(client)


class ChatCompletions:
    def __init__(self, client: Caller) -> None:
        self._client = client

    async def create(
        self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """As OpenAI's, with the checkpoint's chat template; raises NotOffered if it has none. With tools, calls are
        valid by construction. Also: chat_template_kwargs, documents, continue_final_message, separate_reasoning …"""
        arguments = _with_timeout(self._client, arguments)
        served, chat = self._client.names.resolve(model), take_chat(messages, arguments)
        # Checked before the model is asked for anything.
        constraint = chat_plan(served, chat.prompt, **arguments).parameters.structured_outputs
        chat.check_constraint(constraint, arguments)
        profile = await self._client._chat_profile(served.lm)
        needs_prompt = profile.needs_prompt(continues=chat.continues)
        rendered = await self._client._render(served.lm, chat.prompt) if needs_prompt else ""
        answer = chat.answer(profile, rendered, constraint)
        plan = chat_plan(served, chat.prompt, further=answer.parameters, **arguments)
        builder = ChatBuilder(plan, answer, chat.warnings(profile))
        try:
            if not plan.stream:
                return builder.build(await self._client._complete(plan))
            stream = await self._client._stream(
                plan, builder.chunk, _usage_at_end(plan, builder), lambda: builder.usage
            )
        except InvalidRequest as error:
            raise with_argument_name(error, arguments, chat.tools) from None
        stream.warnings = builder.warnings
        return stream

    async def parse(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, response_format: type[M], **arguments: Any
    ) -> ParsedChatCompletion[M]:
        """`create` with a pydantic model as the format of the answer: `choices[0].message.parsed` is its instance. An
        answer that ends by length raises AnswerCutOff. No model refuses here: `refusal` is always None."""
        if arguments.get("stream"):
            raise InvalidRequest("parse has no stream; use create with stream=True", "stream")
        sent = response_format_of(response_format)
        completion = await self.create(model, messages, **{**arguments, "response_format": sent})
        assert isinstance(completion, ChatCompletion)
        return parse_answers(completion, response_format)

    async def apply_template(self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """A chat as text, as the checkpoint's chat template renders it: the prompt that the model would get. Takes
        create's arguments of the prompt."""
        chat = take_chat(messages, arguments)
        if arguments:
            raise InvalidRequest(f"apply_template has no argument {next(iter(arguments))}", next(iter(arguments)))
        return await self._client._render(self._client.names.resolve(model).lm, chat.prompt)

    async def count_tokens(self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> int:
        """The tokens of a chat's prompt. Takes create's arguments of the prompt."""
        text = await self.apply_template(model, messages, **arguments)
        return len(await self._client.tokenize(model, text, add_special_tokens=False))

    async def context_length(self, model: str) -> int:
        """The most tokens of a prompt and its answer together."""
        return int((await self._client.status(model))["context_length"])


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
        adapter: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Normalized mean of the last hidden states; raises NotOffered if the server has embeddings switched off."""
        prompts, encoding = read_inputs(input, encoding_format, dimensions, user)
        served = self._client.names.resolve(model)
        parameters = read_parameters(served.parameters({"adapter": adapter})).to_mapping()
        root = f"embd-{request_id or ''}-{secrets.token_hex(4)}"
        calls = [Call(served.lm, f"{root}-{index}", prompt, parameters) for index, prompt in enumerate(prompts)]
        embeddings: list[PromptEmbedding] = []
        for part, seconds in in_timed_parts(calls, timeout or self._client._timeout):
            embeddings += await self._embed_together([replace(call, timeout=seconds) for call in part])
        return build_embeddings(model, embeddings, encoding)

    async def _embed_together(self, calls: Sequence[Call]) -> list[PromptEmbedding]:
        """The first error cancels the others."""
        tasks = [asyncio.ensure_future(self._embed(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

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
