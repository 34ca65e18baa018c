"""A queue in front of a GPT-2: POST /completions, GET /queue, GET /requests/{id}."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import Completion
from tritonlm.contract import ModelNotFound

from ...schemas import CompletionRequest
from ...settings import GatewaySettings
from ..openai import STREAMED, complete_text
from .common import default_model


class QueueCompletionRequest(CompletionRequest):  # type: ignore[valid-type,misc]
    model: str | None = Field(None, min_length=1, description="the default language model, if it is not named")


class QueueOfModel(BaseModel):
    model: str
    tritons: int = Field(description="on how many it is loaded")
    running: int
    waiting: int
    places: int
    tokens_per_second: float = Field(description="generated, in the last five seconds")
    kv_blocks: int = Field(description="of the KV cache, in all")
    kv_blocks_used: int


class QueueState(BaseModel):
    queue_size: int = Field(description="requests that wait for a place")
    running: int
    places: int = Field(description="requests that can run together")
    total_requests: int
    requests: dict[str, int] = Field(description="what became of the last thousand")
    models: list[QueueOfModel] = Field(description="the same and more of each that is loaded, on all Tritons together")


class RequestState(BaseModel):
    id: str
    model: str
    status: str = Field(description="queued, processing, completed, failed or cancelled")
    position: int | None = Field(description="how many wait before it; null: it does not wait")
    created: float
    finished: float | None
    seconds: float
    prompt_tokens: int
    completion_tokens: int = Field(description="so far")


def _queue_of(model: str, reports: list[dict[str, Any]]) -> QueueOfModel:
    def total(name: str) -> Any:
        return sum(report[name] for report in reports)

    return QueueOfModel(
        model=model,
        tritons=len(reports),
        running=total("running"),
        waiting=total("waiting"),
        places=total("places"),
        tokens_per_second=round(total("tokens_per_second"), 1),
        kv_blocks=total("blocks"),
        kv_blocks_used=total("blocks_used"),
    )


def add_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    @routes.post("/completions", responses={200: {"model": Completion, **STREAMED}})
    async def complete(body: QueueCompletionRequest, request: Request) -> Response:
        """As /v1/completions; the model need not be named."""
        arguments = body.arguments()
        arguments.setdefault("model", await default_model(client, settings))
        return await complete_text(client, settings, request, arguments)

    @routes.get("/queue")
    async def queue(request: Request) -> QueueState:
        """How many requests run and wait, and what became of the last thousand; the numbers are the default model's."""
        status = await client.status(await default_model(client, settings))
        reports = await client.models.reports()
        history = request.app.state.history
        return QueueState(
            queue_size=status["waiting"],
            running=status["running"],
            places=status["places"],
            total_requests=history.total,
            requests=history.counts(),
            models=[_queue_of(model, found) for model, found in reports.items()],
        )

    @routes.get("/requests/{request_id}")
    async def progress(request_id: str, request: Request) -> RequestState:
        """Where a request is: state, times, position, tokens so far."""
        entry = request.app.state.history.get(request_id)
        if entry is None:
            raise ModelNotFound(f"no request {request_id[:64]!r} is known; the last thousand are", "request_id")
        found = await client.progress(request_id) if entry.finished is None else []
        running = any(sequence["state"] == "running" for sequence in found)
        tokens = sum(sequence["completion_tokens"] for sequence in found)
        return RequestState(
            id=entry.id,
            model=entry.model,
            status="processing" if running else entry.status,
            position=min((sequence["position"] for sequence in found if not running), default=None),
            created=entry.created,
            finished=entry.finished,
            seconds=(entry.finished or time.time()) - entry.created,
            prompt_tokens=entry.prompt_tokens,
            completion_tokens=max(tokens, entry.completion_tokens),
        )
