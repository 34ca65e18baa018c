"""Load, unload and delete language models by their names. What they are like, /v1/models tells."""

from __future__ import annotations

import contextlib
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import Model
from tritonlm.contract import ModelNotFound

from ..answers import as_json
from ..errors import RESPONSES
from ..training import Training


class Deleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


def router(client: AsyncClient, training: Training) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.post("/api/models/{name}/load", response_model=Model, responses=RESPONSES)
    async def load(name: str, request: Request) -> Response:
        """Load it, in the place of others where memory is short; where its checkpoint has changed, load it anew."""
        return as_json(await request.app.state.loader.load(name))

    @routes.post("/api/models/{name}/unload", response_model=Model, responses=RESPONSES)
    async def unload(name: str) -> Response:
        """Unload it when its running requests have ended; its next request loads it again."""
        await client.models.retrieve(name)
        return as_json(await client.models.unload(name))

    @routes.delete("/v1/models/{name}", response_model=Deleted, responses=RESPONSES)
    async def delete(name: str) -> Deleted:
        """Unload and forget a language model that a job here has trained; its files stay in the folder for runs."""
        training.check_is_ours(name)
        with contextlib.suppress(ModelNotFound):
            await client.models.unload(name)
        training.forget(name)
        return Deleted(id=name)

    return routes
