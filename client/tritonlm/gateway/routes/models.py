"""Load and unload language models by their names. What they are like, /v1/models tells."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tritonlm.client import AsyncClient
from tritonlm.types import Model

from ..answers import as_json
from ..errors import RESPONSES


def router(client: AsyncClient) -> APIRouter:
    routes = APIRouter(tags=["models"], prefix="/api/models")

    @routes.post("/{name}/load", response_model=Model, responses=RESPONSES)
    async def load(name: str, request: Request) -> Response:
        """Load it, in the place of others where memory is short; where its checkpoint has changed, load it anew."""
        return as_json(await request.app.state.loader.load(name))

    @routes.post("/{name}/unload", response_model=Model, responses=RESPONSES)
    async def unload(name: str) -> Response:
        """Unload it when its running requests have ended; its next request loads it again."""
        await client.models.retrieve(name)
        return as_json(await client.models.unload(name))

    return routes
