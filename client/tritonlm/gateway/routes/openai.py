"""OpenAI's routes: completions, chats, embeddings, models."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.convertors import Convertor, register_url_convertor

from tritonlm.client.types import ChatCompletion, Completion, Embeddings, Model, ModelList

from ..chat_calls import with_names
from ..http.errors import RESPONSES
from ..http.middleware import context_of
from ..http.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from ..http_responses import OPENAI, ResponseFormat, json_response, respond
from ..services import Services, ServicesParameter


class _ModelName(Convertor[str]):
    """A name with slashes and line breaks. Starlette's `path` has none of the latter and ignores one at the end."""

    regex = r"[\s\S]*\Z"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("model_name", _ModelName())
router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=RESPONSES)
# Added to a route's OpenAPI responses when it supports `stream`.
STREAMED: dict[str, Any] = {"content": {"text/event-stream": {}}}


@router.post("/completions", responses={200: {"model": Completion, **STREAMED}})
async def complete(
    body: CompletionRequest,  # type: ignore[valid-type]
    request: Request,
    services: ServicesParameter,
) -> Response:
    """Continue a text. With `stream`, server-sent events."""
    return await complete_text(request, services, body.arguments())  # type: ignore[attr-defined]


@router.post("/chat/completions", responses={200: {"model": ChatCompletion, **STREAMED}})
async def chat(
    body: ChatRequest,  # type: ignore[valid-type]
    request: Request,
    services: ServicesParameter,
) -> Response:
    """Answer a chat, using the checkpoint's chat template; 501 if it has none."""
    arguments = body.arguments()  # type: ignore[attr-defined]
    common = common_arguments(request, services)

    def call() -> Coroutine[Any, Any, Any]:
        return services.client.chat.completions.create(**arguments, **common)

    return await with_names(respond(request, arguments["model"], f"chatcmpl-{common['request_id']}", call), {})


@router.post("/embeddings", responses={200: {"model": Embeddings}})
async def embed(body: EmbeddingRequest, request: Request, services: ServicesParameter) -> Response:
    """Texts as vectors: the normalized mean of the last hidden states; 501 if embeddings are switched off."""
    common = common_arguments(request, services)
    arguments = {**body.arguments(), **common}

    def call() -> Coroutine[Any, Any, Any]:
        return services.client.embeddings.create(**arguments)

    return await respond(request, body.model, f"embd-{common['request_id']}", call)


@router.get("/models", response_model=ModelList)
async def models(services: ServicesParameter) -> Response:
    """The language models, and their adapters."""
    return json_response(services.loader.with_loading_states(await services.client.models.with_adapters()))


@router.get("/models/{name:model_name}", response_model=Model)
async def model(name: str, services: ServicesParameter) -> Response:
    return json_response(services.loader.with_loading_state(await services.client.models.retrieve(name)))


async def complete_text(
    request: Request, services: Services, arguments: dict[str, Any], response_format: ResponseFormat = OPENAI
) -> Response:
    """Run one completion, for this route and for those of older systems."""
    common = common_arguments(request, services)

    def call() -> Coroutine[Any, Any, Any]:
        return services.client.completions.create(**arguments, **common)

    return await respond(request, arguments["model"], f"cmpl-{common['request_id']}", call, response_format)


def common_arguments(request: Request, services: Services) -> dict[str, Any]:
    """The arguments that every call gets from the gateway."""
    return {"request_id": context_of(request.scope).request_id, "timeout": services.settings.request_seconds}
