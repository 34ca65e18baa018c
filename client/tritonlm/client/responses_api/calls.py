"""`client.responses`: the Responses API over the client's chats. It stores nothing: the caller has the conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tritonlm.client.calls import ChatCompletions
from tritonlm.client.chats import renamed
from tritonlm.client.event_stream import AsyncEventStream, EventFormat
from tritonlm.client.request_fields import read_body
from tritonlm.client.stream import AsyncStream
from tritonlm.contract import InvalidRequest, TritonLMError

from .request import NAMES, check_stream_options
from .schemas import ResponseRequest
from .truncation import fitting_call
from .types import ResponseEvent, ResponseObject
from .writer import ResponseWriter

Input = str | Sequence[Mapping[str, Any] | Any]
ResponseStream = AsyncEventStream[ResponseEvent, ResponseObject]


class Responses:
    def __init__(self, chats: ChatCompletions) -> None:
        self._chats = chats

    async def create(
        self,
        model: str,
        input: Input,  # noqa: A002 (OpenAI's name)
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> ResponseObject | ResponseStream:
        """As OpenAI's, with the fields of POST /v1/responses. Items of earlier responses may be a part of the input."""
        sent = read_body(ResponseRequest, {"model": model, "input": input, **fields})
        check_stream_options(sent)
        _refuse_stored(sent)
        try:
            call = await fitting_call(self._chats, sent)
            writer = ResponseWriter(sent, call, is_stored=False)
            answer = await self._chats.create(**call.arguments, request_id=request_id, timeout=timeout)
        except TritonLMError as error:
            raise renamed(error, NAMES) from None
        if not isinstance(answer, AsyncStream):
            return ResponseObject.model_validate(writer.whole(answer))
        event_format = EventFormat(
            begin=lambda _: writer.begin(),
            chunk=writer.chunk,
            end=writer.end,
            event=ResponseEvent.model_validate,
            result=lambda: ResponseObject.model_validate(writer.response),
            error=lambda error: renamed(error, NAMES),
        )
        return AsyncEventStream(answer, event_format)

    async def stream(self, model: str, input: Input, **arguments: Any) -> ResponseStream:  # noqa: A002
        """The events of a response, in the order of OpenAI's library; `final` of the stream is the response."""
        stream = await self.create(model, input, **{**arguments, "stream": True})
        assert isinstance(stream, AsyncEventStream)
        return stream


def _refuse_stored(sent: Mapping[str, Any]) -> None:
    if sent.get("store"):
        raise InvalidRequest("store: this client stores no responses; leave it out", "store")
    if "previous_response_id" in sent:
        raise InvalidRequest(
            "previous_response_id: this client stores no responses; send the whole conversation as input",
            "previous_response_id",
        )
