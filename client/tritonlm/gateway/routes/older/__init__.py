"""The routes of older systems, with the fields, defaults and ranges of their documentation.

- `queue`, a queue in front of a GPT-2: POST /completions, GET /queue, GET /requests/{id}
- `inference`, an inference server for checkpoints: POST /generate, GET /info
- `chat`, a chat server: POST /chat, POST /chat/stream
- `api`, a language model API: GET /api/status, GET /api/models, POST /api/load_model, /api/generate, /api/train

Requests do not name a model; the default model answers.
"""

from __future__ import annotations

from fastapi import APIRouter

from ...http.errors import RESPONSES
from . import api, chat, inference, queue

router = APIRouter(tags=["older systems"], responses=RESPONSES)
for _system in (queue, inference, chat, api):
    router.include_router(_system.router)
