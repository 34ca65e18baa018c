"""The usage of each key since this gateway started."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from ..http.errors import RESPONSES
from ..services import ServicesParameter

router = APIRouter(tags=["keys"], responses=RESPONSES)


class KeyUsage(BaseModel):
    """`key` is empty for callers without one."""

    key: str
    requests: int
    refused: int
    running: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageReport(BaseModel):
    since: int
    keys: list[KeyUsage]


@router.get("/api/usage", response_model=UsageReport)
async def usage(services: ServicesParameter) -> UsageReport:
    """Requests and tokens by key. Each gateway counts its own requests; /metrics has the same numbers."""
    quota = services.quota
    keys = [
        KeyUsage(key=name, running=quota.running[name], **vars(usage)) for name, usage in sorted(quota.usage.items())
    ]
    return UsageReport(since=quota.since, keys=keys)
