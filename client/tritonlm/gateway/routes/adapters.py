"""vLLM's routes that load and unload LoRA adapters while the server runs. /v1/models lists them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field

from tritonlm.client.request_fields import Body, Model

from ..http.errors import RESPONSES
from ..services import ServicesParameter
from .older.common import default_model

router = APIRouter(prefix="/v1", tags=["models"], responses=RESPONSES)


# Errors are JSON: a response class of the route would declare them as text.
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "a sentence", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


class LoadAdapter(Body):
    lora_name: str = Field(description="the name by which requests call it as their model")
    lora_path: str = Field(
        min_length=1, max_length=4096, description="its folder on the server, or ORG/NAME of the Hub"
    )
    base_model: Model | None = Field(None, description="its language model; default: the gateway's default model")
    load_inplace: bool | None = Field(None, description="whether it replaces an adapter of the same name")


class UnloadAdapter(Body):
    lora_name: str = Field(description="the adapter's name")
    base_model: Model | None = Field(None, description="its language model, where several have such an adapter")


@router.post("/load_lora_adapter", response_model=None, responses=_TEXT)
async def load(body: LoadAdapter, services: ServicesParameter) -> PlainTextResponse:
    """Add an adapter to a language model, or replace it; running requests keep the weights that they began with."""
    base = body.base_model or await default_model(services)
    await services.adapters.add(body.lora_name, body.lora_path, base, in_place=bool(body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_model=None, responses=_TEXT)
async def unload(body: UnloadAdapter, services: ServicesParameter) -> PlainTextResponse:
    """Remove an adapter; its running requests end with it, and its folder stays."""
    await services.adapters.remove(body.lora_name, body.base_model)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
