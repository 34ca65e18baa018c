"""The routes of older systems, each with the fields, defaults and ranges that its users know, over the same path.

- `queue`, a queue in front of a GPT-2: POST /completions, GET /queue, GET /requests/{id}
- `inference`, an inference server for checkpoints: POST /generate, GET /info
- `chat`, a chat server: POST /chat, POST /chat/stream
- `api`, a language model API: GET /api/status, GET /api/models, POST /api/load_model, /api/generate, /api/train

They name no model; the default one answers.
"""

from __future__ import annotations

from fastapi import APIRouter

from tritonlm.client.async_client import AsyncClient

from ...errors import RESPONSES
from ...settings import GatewaySettings
from ...training import Training
from . import api, chat, inference, queue


def router(client: AsyncClient, settings: GatewaySettings, training: Training) -> APIRouter:
    routes = APIRouter(tags=["older systems"], responses=RESPONSES)
    for system in (queue, inference, chat):
        system.add_routes(routes, client, settings)
    api.add_routes(routes, client, settings, training)
    return routes
