"""A chat server: POST /chat, POST /chat/stream."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from tritonlm.client.request_fields import Body
from tritonlm.client.types import ChatCompletion, Completion

from ...http.middleware import RequestContext
from ...http_responses import Event, ResponseFormat, respond
from ...services import Services, ServicesParameter
from ..openai import common_arguments
from .common import MaxTokens, Temperature, default_model

router = APIRouter()


class ChatRequest(Body):
    prompt: str = Field(description="the text to answer")
    max_tokens: MaxTokens = 128
    temperature: Temperature = 0.0


class Speed(BaseModel):
    tokens_generated: int
    time_seconds: float
    tokens_per_second: float


class ChatAnswer(Speed):
    prompt: str
    response: str


@router.post("/chat", responses={200: {"model": ChatAnswer}})
async def chat(body: ChatRequest, request: Request, services: ServicesParameter) -> Response:
    """An answer with its speed. A model without a chat template continues the prompt."""

    def complete(result: Completion | ChatCompletion, context: RequestContext) -> str:
        text = result.choices[0].text if isinstance(result, Completion) else result.choices[0].message.content or ""
        speed = _speed(context).model_dump()
        return ChatAnswer(prompt=body.prompt, response=text, **speed).model_dump_json()

    return await _respond(body, request, services, ResponseFormat(complete=complete), stream=False)


@router.post(
    "/chat/stream",
    response_class=Response,
    responses={200: {"description": "the parts of the text as events", "content": {"text/event-stream": {}}}},
)
async def chat_stream(body: ChatRequest, request: Request, services: ServicesParameter) -> Response:
    """The answer's text as server-sent events; the last event, `done`, holds its speed."""
    return await _respond(body, request, services, ResponseFormat(chunk=_text_events, end=_done_event), stream=True)


async def _respond(
    body: ChatRequest, request: Request, services: Services, response_format: ResponseFormat, stream: bool
) -> Response:
    client, model, common = services.client, await default_model(services), common_arguments(request, services)
    arguments: dict[str, Any] = {
        "model": model, "max_tokens": body.max_tokens, "temperature": body.temperature, "stream": stream, **common
    }  # fmt: skip
    about = await services.loader.call(model, lambda: client.about(model))

    def call() -> Coroutine[Any, Any, Any]:
        if about["chat_template"] is None:
            return client.completions.create(prompt=body.prompt, **arguments)
        return client.chat.completions.create(messages=[{"role": "user", "content": body.prompt}], **arguments)

    prefix = "cmpl" if about["chat_template"] is None else "chatcmpl"
    return await respond(request, model, f"{prefix}-{common['request_id']}", call, response_format)


def _text_events(chunk: Any) -> list[Event]:
    choice = chunk.choices[0]
    text = choice.text if isinstance(chunk, Completion) else choice.delta.content
    return [{"data": text}] if text else []


def _done_event(context: RequestContext) -> list[Event]:
    return [{"event": "done", "data": _speed(context).model_dump_json()}]


def _speed(context: RequestContext) -> Speed:
    seconds = time.monotonic() - context.started
    tokens = context.usage.completion_tokens if context.usage else 0
    return Speed(tokens_generated=tokens, time_seconds=seconds, tokens_per_second=tokens / seconds)
