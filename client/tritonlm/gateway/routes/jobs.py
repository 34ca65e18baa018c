"""Training jobs: GET /api/jobs, GET /api/jobs/{id}, its log as events, cancel, resume. POST /api/train adds one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from tritonlm.jobs import Job

from ..http.errors import RESPONSES
from ..services import ServicesParameter

router = APIRouter(prefix="/api/jobs", tags=["training"], responses=RESPONSES)


class JobState(BaseModel):
    id: str
    name: str = Field(description="the name of the language model when the job has finished")
    state: str = Field(description="queued, running, finished, failed, cancelled or interrupted")
    config: dict[str, Any]
    process_id: int | None
    created: float
    started: float | None
    ended: float | None
    error: str | None


class JobList(BaseModel):
    jobs: list[JobState]


def state_of(job: Job) -> JobState:
    return JobState.model_validate({name: getattr(job, name) for name in JobState.model_fields})


@router.get("")
def jobs(services: ServicesParameter) -> JobList:
    """All training jobs, oldest first."""
    return JobList(jobs=[state_of(job) for job in services.training.jobs.all()])


@router.get("/{job_id}")
def job(job_id: str, services: ServicesParameter) -> JobState:
    return state_of(services.training.jobs.get(job_id))


@router.get(
    "/{job_id}/log",
    response_class=Response,
    responses={200: {"description": "the log's lines as events", "content": {"text/event-stream": {}}}},
)
async def log(job_id: str, services: ServicesParameter) -> Response:
    """The job's log from its beginning until the job ends; the last event, `done`, holds the job's state."""
    training = services.training
    training.jobs.get(job_id)

    async def events() -> AsyncIterator[dict[str, str]]:
        async for line in training.log(job_id):
            yield {"data": line}
        yield {"event": "done", "data": training.jobs.get(job_id).state}

    return EventSourceResponse(events(), sep="\n", headers={"X-Accel-Buffering": "no"})


@router.post("/{job_id}/cancel")
def cancel(job_id: str, services: ServicesParameter) -> JobState:
    """Stop a job; its saved checkpoints stay."""
    return state_of(services.training.jobs.cancel(job_id))


@router.post("/{job_id}/resume")
def resume(job_id: str, services: ServicesParameter) -> JobState:
    """Resume a job that was interrupted, cancelled or failed, from its last checkpoint."""
    return state_of(services.training.jobs.resume(job_id))
