"""Anthropic's Messages API: create a message, and count a prompt's tokens. Errors have Anthropic's form."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sse_starlette import ServerSentEvent

from tritonlm.client.messages_api.request import NAMES, chat_call
from tritonlm.client.messages_api.schemas import CountRequest, MessageRequest
from tritonlm.client.messages_api.types import MessageObject, TokenCount
from tritonlm.client.messages_api.writer import MessageWriter
from tritonlm.contract import TritonLMError

from ..chat_calls import count_tokens, with_names
from ..http.errors import RESPONSES, AnthropicErrorBody, anthropic_body, body_of
from ..http_responses import ResponseFormat, named_events, respond
from ..services import ServicesParameter
from .openai import STREAMED, common_arguments

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**response, "model": AnthropicErrorBody} for status, response in RESPONSES.items()
}
router = APIRouter(prefix="/v1/messages", tags=["Anthropic"], responses=_ERRORS)


@router.post("", responses={200: {"model": MessageObject, **STREAMED}})
async def create(
    body: MessageRequest,  # type: ignore[valid-type]
    request: Request,
    services: ServicesParameter,
) -> Response:
    """Answer a chat, through the checkpoint's chat template. With `stream`, Anthropic's events."""
    sent = body.arguments()  # type: ignore[attr-defined]
    call = await asyncio.to_thread(chat_call, sent)
    writer = MessageWriter(sent["model"], call)

    def failure(error: Exception) -> list[dict[str, str]]:
        status = error.http_status if isinstance(error, TritonLMError) else 500
        return named_events(writer.failure(anthropic_body(body_of(error), status)))

    response_format = ResponseFormat(
        complete=lambda chat, _: json.dumps(writer.whole(chat)),
        begin=lambda usage: named_events(writer.begin(usage)),
        chunk=lambda chunk: named_events(writer.chunk(chunk)),
        end=lambda context: named_events(writer.end(context.usage)),
        failure=failure,
        ping=lambda: ServerSentEvent(event="ping", data='{"type": "ping"}', sep="\n"),
        warnings=call.warnings,
    )
    common = common_arguments(request, services)

    async def create_chat() -> Any:
        return await with_names(services.client.chat.completions.create(**call.arguments, **common), NAMES)

    return await respond(request, sent["model"], f"chatcmpl-{common['request_id']}", create_chat, response_format)


@router.post("/count_tokens")
async def count(body: CountRequest, services: ServicesParameter) -> TokenCount:
    """The number of tokens of a prompt, with its chat template."""
    call = chat_call(body.arguments())
    return TokenCount(input_tokens=await count_tokens(services, call.arguments, NAMES))
