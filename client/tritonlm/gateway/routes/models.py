"""Load, unload and delete language models by name. /v1/models describes them."""

from __future__ import annotations

import contextlib
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from tritonlm.client.types import Model
from tritonlm.contract import ModelNotFound

from ..http.errors import RESPONSES
from ..http_responses import json_response
from ..services import ServicesParameter

router = APIRouter(tags=["models"])


class Deleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


@router.post("/api/models/{name}/load", response_model=Model, responses=RESPONSES)
async def load(name: str, services: ServicesParameter) -> Response:
    """Load it, unloading others if memory is short; a loaded model is replaced if its checkpoint has changed."""
    return json_response(await services.loader.load(name))


@router.post("/api/models/{name}/unload", response_model=Model, responses=RESPONSES)
async def unload(name: str, services: ServicesParameter) -> Response:
    """Unload it when its running requests have ended; its next request loads it again."""
    lm = services.client.names.resolve(name).lm
    await services.client.models.retrieve(lm)
    return json_response(await services.client.models.unload(lm))


@router.delete("/v1/models/{name}", response_model=Deleted, responses=RESPONSES)
async def delete(name: str, services: ServicesParameter) -> Deleted:
    """Unload and unregister a model that a job of this server has trained; its files stay in the runs folder."""
    services.training.check_deletable(name)
    # An adapter leaves the engine by itself when no request needs it.
    if not services.client.names.resolve(name).adapter:
        with contextlib.suppress(ModelNotFound):
            await services.client.models.unload(name)
    services.training.unregister(name)
    return Deleted(id=name)
