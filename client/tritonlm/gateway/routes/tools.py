"""Routes beside OpenAI's: tokenization, health, metrics, and an overview of the service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel, Field

import tritonlm
from tritonlm.client.models import slots_of
from tritonlm.client.types import Health
from tritonlm.contract import TritonLMError

from .. import metrics
from ..chat_calls import with_names
from ..http.errors import RESPONSES, RETRY_AFTER_SECONDS
from ..http.schemas import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest
from ..limits.scopes import redirects_to_playground
from ..services import ServicesParameter
from .older.common import default_model, shown_model

router = APIRouter(tags=["tools"])
_ENDPOINTS = {
    "POST /v1/completions": "continue a text",
    "POST /v1/chat/completions": "answer a chat",
    "POST /generate": "generate text from a prompt",
    "POST /chat": "answer a prompt",
    "GET /v1/models": "the language models",
    "GET /info": "the checkpoint",
    "GET /queue": "the running and waiting requests",
    "GET /health": "whether a language model answers",
    "GET /metrics": "metrics in Prometheus format",
    "GET /playground": "a page to try the language models",
    "GET /docs": "interactive documentation",
}


class Tokens(BaseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class QueueReport(BaseModel):
    running: int
    waiting: int
    slots: int = Field(description="how many sequences run together")
    places: int = Field(description="deprecated: the same as slots")
    # A step takes longer than two seconds: the machine is slow or overloaded, and no request is lost.
    slow: bool = False


class HealthReport(BaseModel):
    """`checkpoint`, `model`, `model_loaded` and `note` are fields of older systems."""

    status: str
    live: bool
    ready: bool
    models: list[str]
    model_loaded: bool
    checkpoint: str | None
    model: str | None
    note: str
    queue: QueueReport | None


@router.post("/tokenize", response_model=Tokens, responses=RESPONSES)
async def tokenize(body: TokenizeRequest, services: ServicesParameter) -> Tokens:
    """A text's token ids."""
    client = services.client
    model, special = body.model or await default_model(services), body.add_special_tokens is not False
    ids = await services.loader.call(model, lambda: client.tokenize(model, body.prompt, add_special_tokens=special))
    return Tokens(count=len(ids), max_model_len=(await client.models.retrieve(model)).max_model_len, tokens=ids)


@router.post("/detokenize", response_model=Text, responses=RESPONSES)
async def detokenize(body: DetokenizeRequest, services: ServicesParameter) -> Text:
    """The text of token ids."""
    model = body.model or await default_model(services)
    text = services.loader.call(model, lambda: services.client.detokenize(model, body.tokens))
    return Text(prompt=await with_names(text, {"ids": "tokens"}))


@router.post("/apply-template", response_model=Text, responses=RESPONSES)
async def apply_template(body: ApplyTemplateRequest, services: ServicesParameter) -> Text:
    """A chat as text: the prompt that the chat template renders from it."""
    model = body.model or await default_model(services)
    chats = services.client.chat.completions
    arguments = {**body.arguments(), "model": model}
    return Text(prompt=await services.loader.call(model, lambda: chats.apply_template(**arguments)))


@router.get("/tokenizer_info", responses=RESPONSES)
async def tokenizer_info(services: ServicesParameter, model: str | None = None) -> dict[str, Any]:
    """The special tokens and the chat template, in the format of a tokenizer's configuration."""
    name = model or await default_model(services)
    about = await services.loader.call(name, lambda: services.client.about(name))
    return {**about["special_tokens"], "chat_template": about["chat_template"], "vocab_size": about["vocab_size"]}


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The gateway answers."""
    return {"status": "ok"}


@router.get("/health", response_model=HealthReport, responses={503: {"model": HealthReport}})
@router.get("/healthz", response_model=HealthReport, responses={503: {"model": HealthReport}})
@router.get("/health/ready", response_model=HealthReport, responses={503: {"model": HealthReport}})
async def ready(services: ServicesParameter) -> Response:
    """200 if language models are loaded and all of them answer, else 503."""
    health = await services.client.health()
    closed = services.admission.closed
    if closed:
        health = health.model_copy(update={"ready": False})
    model = shown_model(services, health.models) if health.ready else None
    status = await services.client.status(model) if model else None
    report = HealthReport(
        status="ok" if health.ready else "unavailable",
        live=health.live,
        ready=health.ready,
        models=health.models,
        model_loaded=health.ready,
        checkpoint=model,
        model=model,
        note=_note(health, closed, model, status or {}),
        queue=_queue_report(status) if status else None,
    )
    headers = {} if health.ready else {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return JSONResponse(report.model_dump(), 200 if health.ready else 503, headers)


def _note(health: Health, closed: bool, model: str | None, status: Mapping[str, Any]) -> str:
    """A sentence that describes the state for a person."""
    if not health.live:
        return "no Triton answers"
    if closed:
        return "this gateway is stopping"
    if health.silent:
        return f"{', '.join(health.silent)} does not answer"
    if status.get("slow"):
        return f"{model} is slow: a step has taken {status['step_running_seconds']:.0f} s so far; it makes progress"
    return "a language model is loaded and answers" if health.ready else "no language model answers"


def _queue_report(status: dict[str, Any]) -> QueueReport:
    slots = slots_of(status)
    return QueueReport.model_validate({**status, "slots": slots, "places": slots})


@router.get("/metrics", response_class=PlainTextResponse)
async def exposition(services: ServicesParameter) -> Response:
    """The metrics in Prometheus format."""
    text = await asyncio.to_thread(metrics.exposition, services.live_values)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", response_model=None)
async def overview(request: Request, services: ServicesParameter) -> dict[str, object] | Response:
    """The service's name, state and endpoints; a browser is redirected to the playground."""
    if redirects_to_playground("/", request.headers.get("accept", "")):
        return RedirectResponse("playground")
    try:
        models = [model.id for model in (await services.client.models.list()).data if model.state == "ready"]
    except TritonLMError:
        models = []
    return {
        "service": "tritonlm",
        "version": tritonlm.__version__,
        "status": "running" if models else "no language model is loaded",
        "checkpoint": models[0] if models else None,
        "models": models,
        "documentation": "/docs",
        "endpoints": _ENDPOINTS,
    }
