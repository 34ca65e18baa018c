"""A language model API: GET /api/status, GET /api/models, POST /api/load_model, POST /api/generate, POST /api/train."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tritonlm.client.request_fields import Body, Integer
from tritonlm.client.types import Completion, Model
from tritonlm.contract import InvalidRequest, ModelNotFound
from tritonlm.jobs.store import RUNNING
from tritonlm.training.plan import LoraOptions

from ...http.middleware import RequestContext
from ...http_responses import ResponseFormat
from ...models.registration import known_name, register
from ...services import Services, ServicesParameter
from ..openai import complete_text
from .common import MaxTokens, Temperature, TopK, default_model

router = APIRouter()


class GenerateRequest(Body):
    prompt: str = Field(description="the text to continue")
    max_new_tokens: MaxTokens = 150
    temperature: Temperature = 0.8
    top_k: TopK = 40


class Parameters(BaseModel):
    max_new_tokens: int
    temperature: float
    top_k: int | None


class Generated(BaseModel):
    prompt: str
    generated_text: str = Field(description="the prompt and its continuation")
    parameters: Parameters


class LoadRequest(Body):
    model_config = ConfigDict(protected_namespaces=())

    model_path: str | None = Field(
        None,
        max_length=4096,
        description="the language model's name or a path that ends in it; else a folder, a GGUF file or a Hub id "
        "(ORG/NAME, ORG/NAME:Q4_K_M), which is downloaded and registered",
    )
    model_type: str | None = Field(None, description="the language model's name")


class Message(BaseModel):
    message: str


class Status(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    status: str
    model_loaded: bool
    device: str | None
    timestamp: float


class TrainedModel(BaseModel):
    name: str
    path: str
    config: dict[str, Any] = Field(description="its training record")


class Models(BaseModel):
    pretrained_models: list[str]
    trained_models: list[TrainedModel]
    models: list[Model] = Field(description="all models, as in /v1/models")


class TrainRequest(Body):
    model_config = ConfigDict(protected_namespaces=())

    dataset: str = Field(min_length=1, max_length=200, description="abacus, fable, or a file in the data folder")
    output_dir: str = Field(min_length=1, max_length=200, description="the output folder, inside the runs folder")
    model_type: str | None = Field(None, description="the language model to fine-tune; default: train from scratch")
    lora: LoraOptions | None = Field(None, description="train a LoRA adapter of model_type, not its own weights")
    packing: bool | None = Field(None, description="several short examples in one row, which attention keeps apart")
    context: Integer | None = Field(None, ge=8, le=32_768, description="the longest row in tokens; default: 512")
    batch_size: Integer | None = Field(None, ge=1, le=65_536)
    learning_rate: float | None = Field(None, gt=0, le=1)
    warmup_steps: Integer | None = Field(None, ge=0, description="steps until the learning rate is reached")
    max_iters: Integer | None = Field(None, ge=1, le=10_000_000)
    eval_interval: Integer | None = Field(None, ge=1)
    seed: Integer | None = Field(None, ge=0, lt=2**32)


class TrainAnswer(BaseModel):
    message: str
    job_id: str
    config: dict[str, Any]
    config_path: str
    process_id: int | None = Field(description="null while the job is queued")


@router.get("/api/status")
async def status(services: ServicesParameter) -> Status:
    """Whether a model is loaded, and on which device."""
    ready = [model for model in (await services.client.models.list()).data if model.state == "ready"]
    device = ready[0].device if ready else None
    return Status(status="online", model_loaded=bool(ready), device=device, timestamp=time.time())


@router.get("/api/models")
async def models(services: ServicesParameter) -> Models:
    """All language models; those with a training record are listed separately."""
    listed = services.loader.with_loading_states(await services.client.models.list()).data
    return Models(
        pretrained_models=[model.id for model in listed if not model.training],
        trained_models=[
            TrainedModel(name=model.id, path=model.id, config=model.training) for model in listed if model.training
        ],
        models=listed,
    )


@router.post("/api/load_model")
async def load_model(body: LoadRequest, services: ServicesParameter) -> Message:
    """Load a language model by its name; one that this server does not know is registered first."""
    if (body.model_path is None) == (body.model_type is None):
        raise InvalidRequest("send exactly one of model_path and model_type", "model_path")
    if body.model_path is None:
        await services.loader.load((body.model_type or "").rstrip("/").rpartition("/")[2])
    else:
        await _load_path(body.model_path, services)
    return Message(message="Model loaded successfully")


async def _load_path(model: str, services: Services) -> None:
    registry = services.settings.registry
    try:
        await services.loader.load(await asyncio.to_thread(known_name, model, registry))
    except ModelNotFound:
        await services.loader.load(await asyncio.to_thread(register, model, registry))


@router.post("/api/generate", responses={200: {"model": Generated}})
async def generate(body: GenerateRequest, request: Request, services: ServicesParameter) -> Response:
    """The prompt and its continuation as one text, with the parameters in use."""
    arguments: dict[str, Any] = {
        "model": await default_model(services), "prompt": body.prompt, "max_tokens": body.max_new_tokens,
        "temperature": body.temperature, "top_k": body.top_k,
    }  # fmt: skip

    def complete(completion: Completion, _: RequestContext) -> str:
        parameters = Parameters(**body.model_dump(exclude={"prompt"}))
        text = body.prompt + completion.choices[0].text
        return Generated(prompt=body.prompt, generated_text=text, parameters=parameters).model_dump_json()

    return await complete_text(request, services, arguments, ResponseFormat(complete=complete))


@router.post("/api/train")
def train(body: TrainRequest, services: ServicesParameter) -> TrainAnswer:
    """Add a training job; /api/jobs reports its state. 501 if this server does not train."""
    job = services.training.submit(body.arguments())
    return TrainAnswer(
        message="Training started" if job.state == RUNNING else "Training queued",
        job_id=job.id,
        config=job.config,
        config_path=str(Path(job.out) / "plan.json"),
        process_id=job.process_id,
    )
