"""A chat server: POST /chat, POST /chat/stream."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import ChatCompletion, Completion

from ...answers import Shape, answer
from ...middleware import Context, context_of
from ...schemas import Body
from ...settings import GatewaySettings
from .common import MaxTokens, Temperature, default_model


class ChatRequest(Body):
    prompt: str = Field(description="what to answer")
    max_tokens: MaxTokens = 128
    temperature: Temperature = 0.0


class Speed(BaseModel):
    tokens_generated: int
    time_seconds: float
    tokens_per_second: float


class ChatAnswer(Speed):
    prompt: str
    response: str


def add_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    async def answered(body: ChatRequest, request: Request, shape: Shape, stream: bool) -> Response:
        model, request_id = await default_model(client, settings), context_of(request.scope).request_id
        wanted: dict[str, Any] = {
            "model": model, "max_tokens": body.max_tokens, "temperature": body.temperature, "stream": stream,
            "request_id": request_id, "timeout": settings.request_seconds,
        }  # fmt: skip
        about = await request.app.state.loader.call(model, lambda: client.about(model))

        def call() -> Coroutine[Any, Any, Any]:
            if about["chat_template"] is None:
                return client.completions.create(prompt=body.prompt, **wanted)
            return client.chat.completions.create(messages=[{"role": "user", "content": body.prompt}], **wanted)

        kind = "cmpl" if about["chat_template"] is None else "chatcmpl"
        return await answer(request, model, f"{kind}-{request_id}", call, shape)

    @routes.post("/chat", responses={200: {"model": ChatAnswer}})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer with its speed. A model without a chat template continues the prompt."""

        def whole(found: Completion | ChatCompletion, context: Context) -> str:
            text = found.choices[0].text if isinstance(found, Completion) else found.choices[0].message.content
            speed = _speed(context).model_dump()
            return ChatAnswer(prompt=body.prompt, response=text, **speed).model_dump_json()

        return await answered(body, request, Shape(whole=whole), stream=False)

    @routes.post(
        "/chat/stream",
        response_class=Response,
        responses={200: {"description": "the text's parts as events", "content": {"text/event-stream": {}}}},
    )
    async def chat_stream(body: ChatRequest, request: Request) -> Response:
        """The answer's text as server-sent events; the event `done` closes with its speed."""

        def chunk(found: Any) -> str | None:
            choice = found.choices[0]
            return (choice.text if isinstance(found, Completion) else choice.delta.content) or None

        def end(context: Context) -> dict[str, str]:
            return {"event": "done", "data": _speed(context).model_dump_json()}

        return await answered(body, request, Shape(chunk=chunk, end=end), stream=True)


def _speed(context: Context) -> Speed:
    seconds = time.monotonic() - context.started
    tokens = context.usage.completion_tokens if context.usage else 0
    return Speed(tokens_generated=tokens, time_seconds=seconds, tokens_per_second=tokens / seconds)
