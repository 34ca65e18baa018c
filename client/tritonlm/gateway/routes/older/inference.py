"""An inference server for checkpoints: POST /generate, GET /info."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tritonlm.client.async_client import AsyncClient
from tritonlm.client.types import Completion

from ...answers import Shape
from ...middleware import Context
from ...schemas import Body
from ...settings import GatewaySettings
from ..openai import complete_text
from .common import MaxTokens, Temperature, TopK, default_model


class GenerateRequest(Body):
    prompt: str = Field(description="the text to continue")
    max_tokens: MaxTokens = 100
    temperature: Temperature = 0.8
    top_k: TopK = None
    stop_on_newline: bool = Field(False, description="end at the first line break")


class Generated(BaseModel):
    prompt: str
    generated_text: str = Field(description="the prompt and its continuation")
    tokens_generated: int
    model: str


class CheckpointInfo(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    checkpoint: str
    step: int | None = Field(description="of its training, where the checkpoint has a training record")
    val_loss: float | None
    model_layers: int | None
    model_dim: int | None
    vocab_size: int


def add_routes(routes: APIRouter, client: AsyncClient, settings: GatewaySettings) -> None:
    @routes.post("/generate", responses={200: {"model": Generated}})
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """The prompt and its continuation as one text."""
        model = await default_model(client, settings)
        arguments: dict[str, Any] = {
            "model": model, "prompt": body.prompt, "max_tokens": body.max_tokens, "temperature": body.temperature,
            "top_k": body.top_k, "stop": ["\n"] if body.stop_on_newline else None,
        }  # fmt: skip

        def whole(found: Completion, _: Context) -> str:
            assert found.usage is not None
            return Generated(
                prompt=body.prompt,
                generated_text=body.prompt + found.choices[0].text,
                tokens_generated=found.usage.completion_tokens,
                model=model,
            ).model_dump_json()

        return await complete_text(client, settings, request, arguments, Shape(whole=whole))

    @routes.get("/info")
    async def info(request: Request) -> CheckpointInfo:
        """The checkpoint: sizes, and what its training record tells."""
        model = await default_model(client, settings)
        about = await request.app.state.loader.call(model, lambda: client.about(model))
        return CheckpointInfo(
            checkpoint=model,
            step=about["training"].get("step"),
            val_loss=about["training"].get("val_loss"),
            model_layers=about["layers"],
            model_dim=about["width"],
            vocab_size=about["vocab_size"],
        )
