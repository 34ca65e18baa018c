"""The routes of older systems, each with the fields, defaults and ranges that its users know, over the same path.

- a queue in front of a GPT-2: POST /completions, GET /queue, GET /requests/{id}
- an inference server for checkpoints: POST /generate, GET /info
- a chat server: POST /chat, POST /chat/stream
- a language model API: GET /api/status, GET /api/models, POST /api/load_model, POST /api/generate, POST /api/train

They name no model; the default one answers.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from tritonlm.client import AsyncClient
from tritonlm.contract import InvalidRequest, ModelNotFound, NotOffered, Unavailable
from tritonlm.types import ChatCompletion, Completion

from ..answers import Shape, answer
from ..errors import RESPONSES
from ..middleware import Context, context_of
from ..schemas import Body, CompletionRequest
from ..settings import GatewaySettings
from .openai import complete_text

MaxTokens = Annotated[int, Field(ge=1, le=2048, description="tokens to generate at most")]
Temperature = Annotated[float, Field(ge=0, le=2, description="0 is greedy")]


class QueueCompletionRequest(CompletionRequest):  # type: ignore[valid-type,misc]
    model: str | None = Field(None, description="the default language model, if it is not named")


class GenerateRequest(Body):
    prompt: str = Field(description="the text to continue")
    max_tokens: MaxTokens = 100
    temperature: Temperature = 0.8
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens; null: all")
    stop_on_newline: bool = Field(False, description="end at the first line break")


class ChatRequest(Body):
    prompt: str = Field(description="what to answer")
    max_tokens: MaxTokens = 128
    temperature: Temperature = 0.0


class ApiGenerateRequest(Body):
    prompt: str = Field(description="the text to continue")
    max_new_tokens: MaxTokens = 150
    temperature: Temperature = 0.8
    top_k: int | None = Field(40, ge=1, description="sample among the k likeliest tokens; null: all")


class LoadRequest(Body):
    model_path: str | None = Field(None, description="the language model's name, or a path that ends in it")
    model_type: str | None = Field(None, description="the language model's name")


class TrainRequest(Body):
    dataset: str
    output_dir: str
    model_type: str | None = None
    batch_size: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    max_iters: int | None = Field(None, ge=1)
    eval_interval: int | None = Field(None, ge=1)


def router(client: AsyncClient, settings: GatewaySettings) -> APIRouter:
    routes = APIRouter(tags=["older systems"], responses=RESPONSES)
    _add_queue_routes(routes, client, settings)
    _add_inference_routes(routes, client, settings)
    _add_chat_routes(routes, client, settings)
    _add_api_routes(routes, client, settings)
    return routes


async def default_model(client: AsyncClient, settings: GatewaySettings) -> str:
    if settings.default_model:
        return settings.default_model
    for model in (await client.models.list()).data:
        if model.state == "ready":
            return model.id
    raise Unavailable("no language model is loaded", "model")


def _add_queue_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    @routes.post("/completions", responses={200: {"model": Completion}})
    async def complete(body: QueueCompletionRequest, request: Request) -> Response:
        """As /v1/completions; the model need not be named."""
        arguments = body.arguments()
        arguments.setdefault("model", await default_model(client, settings))
        return await complete_text(client, settings, request, arguments)

    @routes.get("/queue")
    async def queue(request: Request) -> dict[str, Any]:
        """How many requests run and wait, and what became of the last thousand."""
        status = await client.status(await default_model(client, settings))
        return {
            "queue_size": status["waiting"],
            "running": status["running"],
            "places": status["places"],
            "total_requests": request.app.state.history.total,
            "requests": request.app.state.history.counts(),
        }

    @routes.get("/requests/{request_id}")
    async def progress(request_id: str, request: Request) -> dict[str, Any]:
        """Where a request is: state, times, position, tokens so far."""
        entry = request.app.state.history.get(request_id)
        if entry is None:
            raise ModelNotFound(f"no request {request_id[:64]!r} is known; the last thousand are", "request_id")
        found = await client.progress(request_id) if entry.finished is None else []
        running = any(sequence["state"] == "running" for sequence in found)
        tokens = sum(sequence["completion_tokens"] for sequence in found)
        return {
            "id": entry.id,
            "model": entry.model,
            "status": "processing" if running else entry.status,
            "position": min((sequence["position"] for sequence in found if not running), default=None),
            "created": entry.created,
            "finished": entry.finished,
            "seconds": (entry.finished or time.time()) - entry.created,
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": max(tokens, entry.completion_tokens),
        }


def _add_inference_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    @routes.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """The prompt and its continuation as one text."""
        model = await default_model(client, settings)
        arguments: dict[str, Any] = {
            "model": model, "prompt": body.prompt, "max_tokens": body.max_tokens, "temperature": body.temperature,
            "top_k": body.top_k, "stop": ["\n"] if body.stop_on_newline else None,
        }  # fmt: skip

        def whole(found: Completion, _: Context) -> str:
            assert found.usage is not None
            return json.dumps(
                {
                    "prompt": body.prompt,
                    "generated_text": body.prompt + found.choices[0].text,
                    "tokens_generated": found.usage.completion_tokens,
                    "model": model,
                }
            )

        return await complete_text(client, settings, request, arguments, Shape(whole=whole))

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        """The checkpoint: sizes, and what its training record tells."""
        model = await default_model(client, settings)
        about = await client.about(model)
        return {
            "checkpoint": model,
            "step": about["training"].get("step"),
            "val_loss": about["training"].get("val_loss"),
            "model_layers": about["layers"],
            "model_dim": about["width"],
            "vocab_size": about["vocab_size"],
        }


def _add_chat_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    async def call(body: ChatRequest, request: Request, shape: Shape, stream: bool) -> Response:
        model, request_id = await default_model(client, settings), context_of(request.scope).request_id
        wanted: dict[str, Any] = {
            "model": model, "max_tokens": body.max_tokens, "temperature": body.temperature, "stream": stream,
            "request_id": request_id, "timeout": settings.request_seconds,
        }  # fmt: skip
        if (await client.about(model))["chat_template"] is None:
            answered = client.completions.create(prompt=body.prompt, **wanted)
            return await answer(request, model, f"cmpl-{request_id}", answered, shape)
        messages = [{"role": "user", "content": body.prompt}]
        chatted = client.chat.completions.create(messages=messages, **wanted)
        return await answer(request, model, f"chatcmpl-{request_id}", chatted, shape)

    def summary(context: Context) -> dict[str, Any]:
        seconds = time.monotonic() - context.started
        tokens = context.usage.completion_tokens if context.usage else 0
        return {"tokens_generated": tokens, "time_seconds": seconds, "tokens_per_second": tokens / seconds}

    @routes.post("/chat")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer with its speed. A model without a chat template continues the prompt."""

        def whole(found: Completion | ChatCompletion, context: Context) -> str:
            text = found.choices[0].text if isinstance(found, Completion) else found.choices[0].message.content
            return json.dumps({"prompt": body.prompt, "response": text, **summary(context)})

        return await call(body, request, Shape(whole=whole), stream=False)

    @routes.post("/chat/stream", responses={200: {"content": {"text/event-stream": {}}}})
    async def chat_stream(body: ChatRequest, request: Request) -> Response:
        """The answer's text as server-sent events; the event `done` closes with its speed."""

        def chunk(found: Any) -> str | None:
            choice = found.choices[0]
            return (choice.text if isinstance(found, Completion) else choice.delta.content) or None

        shape = Shape(chunk=chunk, end=lambda context: {"event": "done", "data": json.dumps(summary(context))})
        return await call(body, request, shape, stream=True)


def _add_api_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    @routes.get("/api/status")
    async def status() -> dict[str, Any]:
        """Whether a model is loaded, and where it computes."""
        ready = [model for model in (await client.models.list()).data if model.state == "ready"]
        device = ready[0].device if ready else None
        return {"status": "online", "model_loaded": bool(ready), "device": device, "timestamp": time.time()}

    @routes.get("/api/models")
    async def models() -> dict[str, Any]:
        """All language models, those of our own training by themselves."""
        found = (await client.models.list()).data
        trained = {}
        for model in found:
            record = (await client.about(model.id))["training"] if model.state == "ready" else {}
            if record:
                trained[model.id] = {"name": model.id, "path": model.id, "config": record}
        return {
            "pretrained_models": [model.id for model in found if model.id not in trained],
            "trained_models": list(trained.values()),
        }

    @routes.post("/api/load_model")
    async def load_model(body: LoadRequest) -> dict[str, Any]:
        """Load a language model by its name."""
        if (body.model_path is None) == (body.model_type is None):
            raise InvalidRequest("exactly one of model_path and model_type is needed", "model_path")
        name = (body.model_type or body.model_path or "").rstrip("/").rpartition("/")[2]
        await client.models.retrieve(name)
        await client.models.load(name)
        return {"message": "Model loaded successfully"}

    @routes.post("/api/generate")
    async def generate(body: ApiGenerateRequest, request: Request) -> Response:
        """The prompt and its continuation as one text, with the parameters that were used."""
        arguments: dict[str, Any] = {
            "model": await default_model(client, settings), "prompt": body.prompt, "max_tokens": body.max_new_tokens,
            "temperature": body.temperature, "top_k": body.top_k,
        }  # fmt: skip

        def whole(found: Completion, _: Context) -> str:
            parameters = body.model_dump(exclude={"prompt"})
            text = body.prompt + found.choices[0].text
            return json.dumps({"prompt": body.prompt, "generated_text": text, "parameters": parameters})

        return await complete_text(client, settings, request, arguments, Shape(whole=whole))

    @routes.post("/api/train")
    async def train(body: TrainRequest) -> dict[str, Any]:
        """Not offered yet."""
        raise NotOffered(f"this server does not train yet; nothing was started for {body.dataset[:64]!r}")
