"""The settings of `tritonlm serve`: names, ranges, defaults and descriptions, defined once.

Each setting is an option, an environment variable and a row of docs/settings.md (checked by a test). An option
overrides its variable, and a variable overrides the default. This module does not know how Triton uses them.
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
Weights = Literal["auto", "full", "int8", "int4", "fp8"]
KVDtype = Literal["auto", "int8"]
Runner = Literal["auto", "native", "graphs", "reference"]
LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
Port = Annotated[int, Field(ge=1, le=65535)]


def _matching(text: str, pattern: str, allowed: str) -> str:
    if not re.match(pattern, text):
        raise ValueError(f"must be {allowed}")
    return text


def _with_alias(name: str, legacy_variable: str) -> AliasChoices:
    """The option's name, its variable, and the variable of an older system for the same setting."""
    return AliasChoices(name, f"{ENV_PREFIX}{name.upper()}", legacy_variable)


class ObservabilitySettings(BaseSettings):
    """Logs and traces, common to `tritonlm serve` and `tritonlm gateway`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, populate_by_name=True)

    log_format: LogFormat = Field(
        "auto", description="Format of the log: text for persons, json for machines, auto: text on a terminal."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="OpenTelemetry collector that receives traces (OTLP over HTTP), such as http://127.0.0.1:4318.",
    )


class Settings(ObservabilitySettings):
    host: str = Field("127.0.0.1", min_length=1, description="Address that the gateway listens on.")
    port: Port = Field(8080, description="Port that the gateway listens on.")
    gateway: bool = Field(True, description="Whether to start the gateway; without it only Triton runs.")
    triton_host: str = Field("127.0.0.1", min_length=1, description="Address that Triton listens on.")
    http_port: Port = Field(8000, description="Triton's HTTP port.")
    grpc_port: Port = Field(8001, description="Triton's gRPC port.")
    metrics_port: Port = Field(8002, description="Port of Triton's Prometheus metrics.")
    device: Device = Field(
        "auto",
        validation_alias=_with_alias("device", "DEFAULT_DEVICE"),
        description="Default device of language models: auto (every GPU, or the CPU), cpu, cuda, or devices such as "
        "cuda:0,cuda:1, with an engine on each.",
    )
    runner: Runner = Field(
        "auto",
        description="Model runner: native (C++ kernels on a CPU), graphs (Hugging Face's code with CUDA graphs), "
        "reference (Hugging Face's code), or auto: the first that supports the model.",
    )
    dtype: Dtype = Field("auto", description="Number type of weights and KV cache; auto chooses by device.")
    weights: Weights = Field(
        "auto",
        description="Weight format: auto, as the checkpoint holds them, also quantized; full, in the number type; "
        "int8, int4 and (on GPUs that have it) fp8, quantized when loaded, smaller and faster.",
    )
    kv_dtype: KVDtype = Field(
        "auto",
        description="Number type of keys and values in the KV cache: auto, that of the weights, or int8: about half "
        "the memory of bfloat16, and long contexts are faster.",
    )
    max_context_tokens: int | None = Field(
        None,
        ge=1,
        validation_alias=_with_alias("max_context_tokens", "MAX_CONTEXT_TOKENS"),
        description="Default context length of language models; the checkpoint's if unset.",
    )
    model_repository: Annotated[list[Path], NoDecode] = Field(
        default_factory=lambda: [paths.model_repository()],
        min_length=1,
        description="Model repository; may be repeated (comma-separated in the environment).",
    )
    registry: Path | None = Field(
        None,
        validation_alias=_with_alias("registry", "MODEL_REGISTRY_PATH"),
        description="YAML or JSON file that lists more language models; default: the one that tritonlm add writes.",
    )
    checkpoint: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="The same as MODEL: what to serve, under its own name or as NAME=MODEL; may be repeated.",
    )
    adapter: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="LoRA adapter to serve beside its language model: NAME=PATH for the first MODEL, or "
        "LM:NAME=PATH; a folder or ORG/NAME of the Hub; may be repeated.",
    )
    adapters_folder: Path | None = Field(
        None,
        description="Folder of the adapters files, one for each language model; default: the one that tritonlm "
        "adapters writes.",
    )
    load: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Language model to load at start, the others at their first request; may be repeated. Default: "
        "each MODEL and the registry's entries with preload, else the bundled ones.",
    )
    reload: bool = Field(False, description="Whether to reload a language model when its checkpoint changes on disk.")
    max_sequences: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Slots: sequences that the engine runs together; chosen by the engine if unset.",
    )
    kv_cache_tokens: int | None = Field(
        None, ge=1, description="Tokens that the KV cache holds; sized by expected use and free memory if unset."
    )
    speculative_tokens: int | None = Field(
        None,
        ge=0,
        le=15,
        description="Draft tokens per sequence and step, at most, from prompt lookup (speculative decoding): outputs "
        "stay the same, and repetitive texts are generated faster. Off if unset.",
    )
    memory_budget: Size | None = Field(
        None,
        description="Memory for all language models on one device together, such as 8GiB; when one does not fit, the "
        "gateway unloads the least recently used. No limit if unset.",
    )
    idle_unload_seconds: float | None = Field(
        None, ge=0, description="Seconds without a request after which the gateway unloads a model; never if unset."
    )
    enable_embeddings: bool = Field(
        False,
        validation_alias=_with_alias("enable_embeddings", "ENABLE_EMBEDDINGS_BACKEND"),
        description="Whether the language models serve embeddings (/v1/embeddings).",
    )
    training: bool = Field(True, description="Whether callers of the gateway may train language models.")
    log_level: LogLevel = Field("info", description="Detail of the log; debug also shows Triton's log on stderr.")
    logs: Literal["auto", "files", "stderr"] = Field(
        "auto",
        description="Destination of Triton's and the gateway's logs: files in the cache, this command's stderr, or "
        "auto: files, but the gateway's lines to a terminal.",
    )
    load_seconds: float = Field(
        600, gt=0, description="Time that a load may take without progress, and until the first answer."
    )
    drain_seconds: float = Field(
        30, ge=0, description="Time that running requests have after the stop signal, before they are cut off."
    )

    @field_validator("model_repository", "load", "checkpoint", "adapter", mode="before")
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
        """Whether logs go to files; at debug level they go to stderr."""
        return self.logs != "stderr" and self.log_level != "debug"

    def engine_environment(self) -> dict[str, str]:
        """Environment variables that pass explicitly set values to the engine's process."""
        names = (
            "device", "dtype", "weights", "kv_dtype", "runner", "max_context_tokens", "max_sequences",
            "kv_cache_tokens", "speculative_tokens", "memory_budget", "idle_unload_seconds", "enable_embeddings",
            "log_level", "log_format", "otlp_endpoint",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return {env_name(name): str(value) for name, value in values.items() if value is not None}

    @property
    def adapters(self) -> Path:
        """The folder of the adapters files that the engines follow."""
        return (self.adapters_folder or paths.adapters()).resolve()


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


SettingsType = TypeVar("SettingsType", bound=BaseSettings)


def read_settings(options: dict[str, object]) -> Settings:
    return read_settings_of(Settings, options)


def read_settings_of(settings_type: type[SettingsType], options: dict[str, object]) -> SettingsType:
    """Settings from the options that are set and the environment; ServingError names the first invalid one."""
    values: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        return settings_type(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            raise ServingError(message) from None
        field = _field_of(settings_type, str(problem["loc"][0]))
        value = str(problem["input"]) if isinstance(problem["input"], Path) else problem["input"]
        raise ServingError(f"{option_name(field)} ({env_name(field)}): {message}, got {value!r}") from None


def _field_of(settings_type: type[BaseSettings], name: str) -> str:
    """The field's name, where pydantic reports the name of a variable."""
    for field, info in settings_type.model_fields.items():
        if isinstance(info.validation_alias, AliasChoices) and name in info.validation_alias.choices:
            return field
    return name
