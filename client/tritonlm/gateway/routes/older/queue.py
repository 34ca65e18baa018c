"""A queue in front of a GPT-2: POST /completions, GET /queue, GET /requests/{id}."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from tritonlm.client.models import slots_of
from tritonlm.client.request_fields import Model
from tritonlm.client.types import Completion
from tritonlm.contract import ModelNotFound, NotLoaded

from ...http.schemas import CompletionRequest
from ...services import ServicesParameter
from ..openai import STREAMED, complete_text
from .common import default_model, shown_model

router = APIRouter()


class QueueCompletionRequest(CompletionRequest):  # type: ignore[valid-type,misc]
    model: Model | None = Field(None, description="the language model; default: the gateway's default model")


class ModelQueue(BaseModel):
    model: str
    tritons: int = Field(description="the number of Tritons on which it is loaded")
    running: int
    waiting: int
    slots: int = Field(description="how many sequences run together")
    places: int = Field(description="deprecated: the same as slots")
    tokens_per_second: float = Field(description="generated, in the last five seconds")
    kv_blocks: int = Field(description="the number of KV cache blocks")
    kv_blocks_used: int


class QueueState(BaseModel):
    queue_size: int = Field(description="requests that wait for a slot")
    running: int
    slots: int = Field(description="how many sequences run together")
    places: int = Field(description="deprecated: the same as slots")
    total_requests: int
    requests: dict[str, int] = Field(description="the last thousand requests by status")
    models: list[ModelQueue] = Field(description="the queue of each loaded model, summed over all Tritons")


class RequestState(BaseModel):
    id: str
    model: str
    status: str = Field(description="queued, processing, completed, failed or cancelled")
    position: int | None = Field(description="the number of requests before it in the queue; null if it does not wait")
    created: float
    finished: float | None
    seconds: float
    prompt_tokens: int
    completion_tokens: int = Field(description="generated so far")


@router.post("/completions", responses={200: {"model": Completion, **STREAMED}})
async def complete(body: QueueCompletionRequest, request: Request, services: ServicesParameter) -> Response:
    """As /v1/completions, with an optional model."""
    arguments = body.arguments()
    arguments.setdefault("model", await default_model(services))
    return await complete_text(request, services, arguments)


@router.get("/queue")
async def queue(services: ServicesParameter) -> QueueState:
    """The running and waiting requests of the default model, or of the first one if that is not loaded, and the last
    thousand requests by status."""
    reports = await services.client.models.reports()
    if not reports:
        raise NotLoaded("no language model is loaded; load one with POST /api/models/NAME/load")
    status = await services.client.status(shown_model(services, reports))
    return QueueState(
        queue_size=status["waiting"],
        running=status["running"],
        slots=slots_of(status),
        places=slots_of(status),
        total_requests=services.history.total,
        requests=services.history.counts(),
        models=[_model_queue(model, model_reports) for model, model_reports in reports.items()],
    )


def _model_queue(model: str, reports: list[dict[str, Any]]) -> ModelQueue:
    def total(name: str) -> Any:
        return sum(report[name] for report in reports)

    slots = sum(map(slots_of, reports))
    return ModelQueue(
        model=model,
        tritons=len(reports),
        running=total("running"),
        waiting=total("waiting"),
        slots=slots,
        places=slots,
        tokens_per_second=round(total("tokens_per_second"), 1),
        kv_blocks=total("blocks"),
        kv_blocks_used=total("blocks_used"),
    )


# A caller's own id may hold slashes.
@router.get("/requests/{request_id:path}")
async def progress(request_id: str, services: ServicesParameter) -> RequestState:
    """The state of a request: status, times, position in the queue, tokens so far."""
    entry = services.history.get(request_id)
    if entry is None:
        raise ModelNotFound(f"no request {request_id[:64]!r} is among the last thousand", "request_id")
    sequences = await services.client.progress(request_id) if entry.finished is None else []
    running = any(sequence["state"] == "running" for sequence in sequences)
    tokens = sum(sequence["completion_tokens"] for sequence in sequences)
    return RequestState(
        id=entry.id,
        model=entry.model,
        status="processing" if running else entry.status,
        position=min((sequence["position"] for sequence in sequences if not running), default=None),
        created=entry.created,
        finished=entry.finished,
        seconds=(entry.finished or time.time()) - entry.created,
        prompt_tokens=entry.prompt_tokens,
        completion_tokens=max(tokens, entry.completion_tokens),
    )
