"""The settings of `tritonlm serve`: names, ranges, defaults and meanings, written once.

Each is an option, an environment variable and a row of docs/settings.md (held true by a test); an option wins over
its variable, a variable over the default. This file does not know what Triton does with them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tritonlm.contract import devices

from . import paths
from .errors import ServingError

ENV_PREFIX = "TRITONLM_"

Device = Annotated[str, AfterValidator(lambda text: _matching(text, devices.PATTERN, devices.ALLOWED))]
Size = Annotated[
    str, AfterValidator(lambda text: _matching(text, r"^\d+(\.\d+)? ?([KMGT]i?B|B)?$", "a size such as 8GiB or 500MB"))
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["full", "int8"]
Runner = Literal["auto", "native", "graphs", "reference"]
LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
Port = Annotated[int, Field(ge=1, le=65535)]


def _matching(text: str, pattern: str, allowed: str) -> str:
    if not re.match(pattern, text):
        raise ValueError(f"must be {allowed}")
    return text


def _also(name: str, plain: str) -> AliasChoices:
    """Our option's and variable's name, and the variable that an older system had for the same thing."""
    return AliasChoices(name, f"{ENV_PREFIX}{name.upper()}", plain)


class Telling(BaseSettings):
    """How each process of ours tells what it does."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, populate_by_name=True)

    log_format: LogFormat = Field(
        "auto", description="How the log is written: text for persons, json for machines, auto: text on a terminal."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="OpenTelemetry collector to which traces go (OTLP over HTTP), such as http://127.0.0.1:4318.",
    )


class Settings(Telling):
    host: str = Field("127.0.0.1", min_length=1, description="Address that the gateway listens on.")
    port: Port = Field(8080, description="Port that the gateway listens on.")
    gateway: bool = Field(True, description="Whether to start the gateway; without it there is Triton alone.")
    triton_host: str = Field("127.0.0.1", min_length=1, description="Address that Triton listens on.")
    http_port: Port = Field(8000, description="Triton's HTTP port.")
    grpc_port: Port = Field(8001, description="Triton's gRPC port.")
    metrics_port: Port = Field(8002, description="Port of Triton's Prometheus metrics.")
    device: Device = Field(
        "auto",
        validation_alias=_also("device", "DEFAULT_DEVICE"),
        description="Where language models compute that do not say so themselves: auto (every GPU, or the CPU), cpu, "
        "cuda, or devices such as cuda:0,cuda:1, with an engine on each.",
    )
    runner: Runner = Field(
        "auto",
        description="What computes: kernels of our own (native, on a CPU), Hugging Face's code with recorded steps "
        "(graphs, for GPUs) or as it is (reference), or the first that can.",
    )
    dtype: Dtype = Field("auto", description="Number type of weights and cache; auto is what suits the device.")
    weights: Weights = Field(
        "full",
        description="How weights are kept and multiplied: full, as the number type says; int8, in eight bits, smaller "
        "and faster (GPT-2, Llama, Mistral, Qwen 2 and 3 on a CPU).",
    )
    max_context_tokens: int | None = Field(
        None,
        ge=1,
        validation_alias=_also("max_context_tokens", "MAX_CONTEXT_TOKENS"),
        description="Longest context of language models that do not say so themselves; the checkpoint's if unset.",
    )
    model_repository: Annotated[list[Path], NoDecode] = Field(
        default_factory=lambda: [paths.model_repository()],
        min_length=1,
        description="Model repository; may be repeated (comma-separated in the environment).",
    )
    registry: Path | None = Field(
        None,
        validation_alias=_also("registry", "MODEL_REGISTRY_PATH"),
        description="YAML or JSON file that names more language models; default: the one that tritonlm add writes.",
    )
    checkpoint: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Checkpoint folder to serve under its own name, or NAME=FOLDER; may be repeated.",
    )
    load: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Language model to load at once, the others at their first request; may be repeated. Default: "
        "each --checkpoint and what the registry preloads, else the bundled ones.",
    )
    reload: bool = Field(False, description="Whether a checkpoint that changes on disk takes the loaded one's place.")
    max_sequences: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Places: sequences that the engine runs together; the engine's choice if unset.",
    )
    kv_cache_tokens: int | None = Field(
        None, ge=1, description="Tokens that the KV cache holds; sized by likely use and free memory if unset."
    )
    speculative_tokens: int | None = Field(
        None,
        ge=0,
        le=15,
        description="Tokens that are guessed ahead of each request, at most, from what its text holds already (prompt "
        "lookup): texts stay the same, and come sooner where they repeat themselves. None if unset.",
    )
    memory_budget: Size | None = Field(
        None,
        description="Memory that all language models on one device may take together, such as 8GiB; where one does "
        "not fit, the gateway unloads the least recently used. No limit if unset.",
    )
    idle_unload_seconds: float | None = Field(
        None, ge=0, description="After so long without a request the gateway unloads a language model; never if unset."
    )
    enable_embeddings: bool = Field(
        False,
        validation_alias=_also("enable_embeddings", "ENABLE_EMBEDDINGS_BACKEND"),
        description="Whether the language models embed prompts (/v1/embeddings).",
    )
    training: bool = Field(True, description="Whether callers of the gateway may train language models.")
    log_level: LogLevel = Field("info", description="Detail of the log; debug also shows Triton's log on stderr.")
    logs: Literal["auto", "files", "stderr"] = Field(
        "auto",
        description="Where Triton's and the gateway's logs go: files in the cache, this command's own stderr, or auto: "
        "files, but the gateway's lines to a terminal.",
    )
    load_seconds: float = Field(600, gt=0, description="How long one language model may take to load and answer.")
    drain_seconds: float = Field(
        30, ge=0, description="How long running requests may go on after the signal to stop, before they are cut off."
    )

    @field_validator("model_repository", "load", "checkpoint", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        ports = [self.http_port, self.grpc_port, self.metrics_port, *([self.port] if self.gateway else [])]
        if len(set(ports)) < len(ports):
            raise ValueError("port, http_port, grpc_port and metrics_port must be different ports")
        return self

    @property
    def logs_to_files(self) -> bool:
        """At debug level they are shown at once."""
        return self.logs != "stderr" and self.log_level != "debug"

    def engine_environment(self) -> dict[str, str]:
        """The variables through which the engine's process learns what it was asked for; unset means its default."""
        asked = (
            "device", "dtype", "weights", "runner", "max_context_tokens", "max_sequences", "kv_cache_tokens",
            "speculative_tokens", "memory_budget", "idle_unload_seconds", "enable_embeddings", "log_level",
            "log_format", "otlp_endpoint",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in asked if name in self.model_fields_set}
        return {env_name(name): str(value) for name, value in values.items() if value is not None}


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


Kind = TypeVar("Kind", bound=BaseSettings)


def read_settings(given: dict[str, object]) -> Settings:
    return read_any(Settings, given)


def read_any(kind: type[Kind], given: dict[str, object]) -> Kind:
    """Settings from the options that were given and the environment; ServingError names the first bad one."""
    values: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, [])}
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            raise ServingError(message) from None
        field = _field_of(kind, str(problem["loc"][0]))
        raise ServingError(f"{option_name(field)} ({env_name(field)}): {message}, got {problem['input']!r}") from None


def _field_of(kind: type[BaseSettings], name: str) -> str:
    """A field's own name, where pydantic tells the name of a variable."""
    for field, info in kind.model_fields.items():
        if isinstance(info.validation_alias, AliasChoices) and name in info.validation_alias.choices:
            return field
    return name
