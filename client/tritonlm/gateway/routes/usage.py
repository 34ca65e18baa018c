"""What each key has used since this gateway started."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from ..errors import RESPONSES
from ..quota import Allowance


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


def router(allowance: Allowance) -> APIRouter:
    routes = APIRouter(tags=["keys"], responses=RESPONSES)

    @routes.get("/api/usage", response_model=UsageReport)
    async def usage() -> UsageReport:
        """Requests and tokens by key. Several gateways count each for itself; /metrics has the same numbers."""
        keys = [
            KeyUsage(key=name, running=allowance.running[name], **vars(used))
            for name, used in sorted(allowance.used.items())
        ]
        return UsageReport(since=allowance.since, keys=keys)

    return routes
