"""OpenAI's routes: completions, chats, embeddings, models."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import ChatCompletion, Completion, Embeddings, Model, ModelList
from tritonlm.contract import NotOffered

from ..answers import OPENAI, Shape, answer, as_json
from ..errors import RESPONSES
from ..middleware import context_of
from ..schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from ..settings import GatewaySettings

# What `stream` adds to a route's answers.
STREAMED: dict[str, Any] = {"content": {"text/event-stream": {}}}


def router(client: AsyncClient, settings: GatewaySettings) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=RESPONSES)

    @routes.post("/completions", responses={200: {"model": Completion, **STREAMED}})
    async def complete(body: CompletionRequest, request: Request) -> Response:  # type: ignore[valid-type]
        """Continue a text. With `stream`, server-sent events."""
        return await complete_text(client, settings, request, body.arguments())  # type: ignore[attr-defined]

    @routes.post("/chat/completions", responses={200: {"model": ChatCompletion, **STREAMED}})
    async def chat(body: ChatRequest, request: Request) -> Response:  # type: ignore[valid-type]
        """Answer a chat, through the checkpoint's chat template; 501 where it has none."""
        arguments = body.arguments()  # type: ignore[attr-defined]
        request_id = context_of(request.scope).request_id

        def call() -> Coroutine[Any, Any, Any]:
            return client.chat.completions.create(**arguments, request_id=request_id, timeout=settings.request_seconds)

        try:
            return await answer(request, arguments["model"], f"chatcmpl-{request_id}", call)
        except NotOffered as error:
            raise NotOffered("this model has no chat template; use /v1/completions instead", error.param) from None

    @routes.post("/embeddings", responses={200: {"model": Embeddings}})
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        """Texts as vectors: mean-pooled last hidden states, at length one; 501 where they are switched off."""
        request_id = context_of(request.scope).request_id
        wanted = {**body.arguments(), "request_id": request_id, "timeout": settings.request_seconds}

        def call() -> Coroutine[Any, Any, Any]:
            return client.embeddings.create(**wanted)

        return await answer(request, body.model, f"embd-{request_id}", call)

    @routes.get("/models", response_model=ModelList)
    async def models(request: Request) -> Response:
        return as_json(request.app.state.loader.seen(await client.models.list()))

    @routes.get("/models/{name:path}", response_model=Model)
    async def model(name: str, request: Request) -> Response:
        return as_json(request.app.state.loader.state_of(await client.models.retrieve(name)))

    return routes


async def complete_text(
    client: AsyncClient, settings: GatewaySettings, request: Request, arguments: dict[str, Any], shape: Shape = OPENAI
) -> Response:
    """One completion, for this route and for those of older systems."""
    request_id = context_of(request.scope).request_id

    def call() -> Coroutine[Any, Any, Any]:
        return client.completions.create(**arguments, request_id=request_id, timeout=settings.request_seconds)

    return await answer(request, arguments["model"], f"cmpl-{request_id}", call, shape)
