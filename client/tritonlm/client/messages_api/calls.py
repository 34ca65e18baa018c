"""`client.messages`: Anthropic's Messages API over the client's chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tritonlm.client.calls import ChatCompletions
from tritonlm.client.chats import prompt_arguments, renamed
from tritonlm.client.event_stream import AsyncEventStream, EventFormat
from tritonlm.client.request_fields import read_body
from tritonlm.client.stream import AsyncStream
from tritonlm.contract import TritonLMError

from .request import NAMES, chat_call
from .schemas import CountRequest, MessageRequest
from .types import MessageEvent, MessageObject, TokenCount
from .writer import MessageWriter

MessageStream = AsyncEventStream[MessageEvent, MessageObject]


class Messages:
    def __init__(self, chats: ChatCompletions) -> None:
        self._chats = chats

    async def create(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> MessageObject | MessageStream:
        """As Anthropic's, with the fields of POST /v1/messages; `max_tokens` is required."""
        call = chat_call(read_body(MessageRequest, {"model": model, "messages": messages, **fields}))
        writer = MessageWriter(model, call)
        try:
            answer = await self._chats.create(**call.arguments, request_id=request_id, timeout=timeout)
        except TritonLMError as error:
            raise renamed(error, NAMES) from None
        if not isinstance(answer, AsyncStream):
            return MessageObject.model_validate(writer.whole(answer))
        event_format = EventFormat(
            begin=writer.begin,
            chunk=writer.chunk,
            end=writer.end,
            event=MessageEvent.model_validate,
            result=lambda: MessageObject.model_validate(writer.message),
            error=lambda error: renamed(error, NAMES),
        )
        return AsyncEventStream(answer, event_format)

    async def stream(self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> MessageStream:
        """The events of a message, in the order of Anthropic's library; `final` of the stream is the message."""
        stream = await self.create(model, messages, **{**arguments, "stream": True})
        assert isinstance(stream, AsyncEventStream)
        return stream

    async def count_tokens(self, model: str, messages: Sequence[Mapping[str, Any]], **fields: Any) -> TokenCount:
        """The tokens of a prompt, with its chat template. Takes create's fields of the prompt."""
        call = chat_call(read_body(CountRequest, {"model": model, "messages": messages, **fields}))
        try:
            return TokenCount(input_tokens=await self._chats.count_tokens(**prompt_arguments(call.arguments)))
        except TritonLMError as error:
            raise renamed(error, NAMES) from None
