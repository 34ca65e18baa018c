"""An inference server for checkpoints: POST /generate, GET /info."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tritonlm.client.request_fields import Body
from tritonlm.client.types import Completion

from ...http.middleware import RequestContext
from ...http_responses import ResponseFormat
from ...services import ServicesParameter
from ..openai import complete_text
from .common import MaxTokens, Temperature, TopK, default_model

router = APIRouter()


class GenerateRequest(Body):
    prompt: str = Field(description="the text to continue")
    max_tokens: MaxTokens = 100
    temperature: Temperature = 0.8
    top_k: TopK = None
    stop_on_newline: bool = Field(False, description="stop at the first line break")


class Generated(BaseModel):
    prompt: str
    generated_text: str = Field(description="the prompt and its continuation")
    tokens_generated: int
    model: str


class CheckpointInfo(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    checkpoint: str
    step: int | None = Field(description="the training step, if the checkpoint has a training record")
    val_loss: float | None
    model_layers: int | None
    model_dim: int | None
    vocab_size: int


@router.post("/generate", responses={200: {"model": Generated}})
async def generate(body: GenerateRequest, request: Request, services: ServicesParameter) -> Response:
    """The prompt and its continuation as one text."""
    model = await default_model(services)
    arguments: dict[str, Any] = {
        "model": model, "prompt": body.prompt, "max_tokens": body.max_tokens, "temperature": body.temperature,
        "top_k": body.top_k, "stop": ["\n"] if body.stop_on_newline else None,
    }  # fmt: skip

    def complete(completion: Completion, _: RequestContext) -> str:
        assert completion.usage is not None
        return Generated(
            prompt=body.prompt,
            generated_text=body.prompt + completion.choices[0].text,
            tokens_generated=completion.usage.completion_tokens,
            model=model,
        ).model_dump_json()

    return await complete_text(request, services, arguments, ResponseFormat(complete=complete))


@router.get("/info")
async def info(services: ServicesParameter) -> CheckpointInfo:
    """The checkpoint: its sizes, and fields of its training record."""
    model = await default_model(services)
    about = await services.loader.call(model, lambda: services.client.about(model))
    return CheckpointInfo(
        checkpoint=model,
        step=about["training"].get("step"),
        val_loss=about["training"].get("val_loss"),
        model_layers=about["layers"],
        model_dim=about["width"],
        vocab_size=about["vocab_size"],
    )
