"""Routes beside OpenAI's: tokens, health, metrics, and what is here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel

import tritonlm
from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import Health
from tritonlm.contract import TritonLMError

from .. import metrics
from ..errors import RESPONSES, RETRY_AFTER_SECONDS
from ..schemas import DetokenizeRequest, TokenizeRequest
from ..scopes import leads_on
from ..settings import GatewaySettings
from .older.common import default_model


class Tokens(BaseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class QueueReport(BaseModel):
    running: int
    waiting: int
    places: int
    # A step takes longer than two seconds: the machine is slow or has too much to do, and nothing is lost.
    slow: bool = False


class HealthReport(BaseModel):
    """`checkpoint`, `model`, `model_loaded` and `note` are what older systems' users look at."""

    status: str
    live: bool
    ready: bool
    models: list[str]
    model_loaded: bool
    checkpoint: str | None
    model: str | None
    note: str
    queue: QueueReport | None


def _note(found: Health, closed: bool, model: str | None, status: Mapping[str, Any]) -> str:
    """What a person is told of it."""
    if not found.live:
        return "no Triton answers"
    if closed:
        return "this gateway is being stopped"
    if found.silent:
        return f"{', '.join(found.silent)} does not answer"
    if status.get("slow"):
        return f"{model} is slow: a step has taken {status['step_running_seconds']:.0f} s so far; it makes progress"
    return "a language model is loaded and answers" if found.ready else "no language model answers"


def router(client: AsyncClient, settings: GatewaySettings) -> APIRouter:
    routes = APIRouter(tags=["tools"])

    @routes.post("/tokenize", response_model=Tokens, responses=RESPONSES)
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
        """A text's token ids."""
        model, special = body.model or await default_model(client, settings), body.add_special_tokens is not False
        ids = await request.app.state.loader.call(
            model, lambda: client.tokenize(model, body.prompt, add_special_tokens=special)
        )
        return Tokens(count=len(ids), max_model_len=(await client.models.retrieve(model)).max_model_len, tokens=ids)

    @routes.post("/detokenize", response_model=Text, responses=RESPONSES)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Text:
        """Token ids' text."""
        model = body.model or await default_model(client, settings)
        text = await request.app.state.loader.call(model, lambda: client.detokenize(model, body.tokens))
        return Text(prompt=text)

    @routes.get("/tokenizer_info", responses=RESPONSES)
    async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
        """The special tokens and the chat template, as a tokenizer's configuration has them."""
        name = model or await default_model(client, settings)
        about = await request.app.state.loader.call(name, lambda: client.about(name))
        return {**about["special_tokens"], "chat_template": about["chat_template"], "vocab_size": about["vocab_size"]}

    @routes.get("/health/live")
    async def live() -> dict[str, str]:
        """The gateway answers."""
        return {"status": "ok"}

    @routes.get("/health", response_model=HealthReport, responses={503: {"model": HealthReport}})
    @routes.get("/healthz", response_model=HealthReport, responses={503: {"model": HealthReport}})
    @routes.get("/health/ready", response_model=HealthReport, responses={503: {"model": HealthReport}})
    async def ready(request: Request) -> Response:
        """Language models are loaded and all of them answer: 200; else 503."""
        found = await client.health()
        closed = request.app.state.admission.closed
        if closed:
            found = found.model_copy(update={"ready": False})
        model = await default_model(client, settings) if found.ready else None
        status = await client.status(model) if model else None
        report = HealthReport(
            status="ok" if found.ready else "unavailable",
            live=found.live,
            ready=found.ready,
            models=found.models,
            model_loaded=found.ready,
            checkpoint=model,
            model=model,
            note=_note(found, closed, model, status or {}),
            queue=QueueReport.model_validate(status) if status else None,
        )
        headers = {} if found.ready else {"Retry-After": str(RETRY_AFTER_SECONDS)}
        return JSONResponse(report.model_dump(), 200 if found.ready else 503, headers)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def exposition(request: Request) -> Response:
        """Prometheus' format."""
        text = await asyncio.to_thread(metrics.exposition, request.app.state.looks)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/", response_model=None)
    async def overview(request: Request) -> dict[str, object] | Response:
        """What this is and where to go; a browser is led to the playground."""
        if leads_on("/", request.headers.get("accept", "")):
            return RedirectResponse("playground")
        try:
            models = [model.id for model in (await client.models.list()).data if model.state == "ready"]
        except TritonLMError:
            models = []
        return {
            "service": "tritonlm",
            "version": tritonlm.__version__,
            "status": "running" if models else "no language model is loaded",
            "checkpoint": models[0] if models else None,
            "models": models,
            "documentation": "/docs",
            "endpoints": {
                "POST /v1/completions": "continue a text",
                "POST /v1/chat/completions": "answer a chat",
                "POST /generate": "generate text from a prompt",
                "POST /chat": "answer a prompt",
                "GET /v1/models": "the language models",
                "GET /info": "the checkpoint",
                "GET /queue": "what runs and waits",
                "GET /health": "whether a language model answers",
                "GET /metrics": "counters in Prometheus' format",
                "GET /playground": "a page to try the language models",
                "GET /docs": "interactive documentation",
            },
        }

    return routes
