"""Training jobs: GET /api/jobs, GET /api/jobs/{id}, its log as events, cancel, resume. POST /api/train begins one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from tritonlm.jobs import Job

from ..errors import RESPONSES
from ..training import Training


class JobState(BaseModel):
    id: str
    name: str = Field(description="what it is called among the language models once it is finished")
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


def router(training: Training) -> APIRouter:
    routes = APIRouter(prefix="/api/jobs", tags=["training"], responses=RESPONSES)

    @routes.get("")
    def jobs() -> JobList:
        """All training jobs, oldest first."""
        return JobList(jobs=[state_of(job) for job in training.keeper.all()])

    @routes.get("/{job_id}")
    def job(job_id: str) -> JobState:
        return state_of(training.keeper.get(job_id))

    @routes.get(
        "/{job_id}/log",
        response_class=Response,
        responses={200: {"description": "the log's lines as events", "content": {"text/event-stream": {}}}},
    )
    async def log(job_id: str) -> Response:
        """The job's log from its beginning, followed to its end; the event `done` tells how it ended."""
        training.keeper.get(job_id)

        async def events() -> AsyncIterator[dict[str, str]]:
            async for line in training.log(job_id):
                yield {"data": line}
            yield {"event": "done", "data": training.keeper.get(job_id).state}

        return EventSourceResponse(events(), sep="\n", headers={"X-Accel-Buffering": "no"})

    @routes.post("/{job_id}/cancel")
    def cancel(job_id: str) -> JobState:
        """End a job; what it has saved stays."""
        return state_of(training.keeper.cancel(job_id))

    @routes.post("/{job_id}/resume")
    def resume(job_id: str) -> JobState:
        """Go on with a job that was interrupted, cancelled or failed, from its last checkpoint."""
        return state_of(training.keeper.resume(job_id))

    return routes
