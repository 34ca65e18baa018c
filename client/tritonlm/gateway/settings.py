"""The settings of `tritonlm gateway`: names, ranges, defaults and meanings, written once.

Each is an option, an environment variable and a row of docs/settings.md. It does not know what they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from tritonlm.serving.settings import ENV_PREFIX, Telling


def _also(name: str, plain: str) -> AliasChoices:
    """Our variable's name, and the one that an older system had for the same thing."""
    return AliasChoices(name, f"{ENV_PREFIX}{name.upper()}", plain)


class GatewaySettings(Telling):
    triton: Annotated[list[str], NoDecode] = Field(
        default_factory=lambda: ["127.0.0.1:8001"],
        min_length=1,
        description="gRPC address of a Triton; may be repeated (comma-separated in the environment).",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address that the gateway listens on.")
    port: int = Field(8080, ge=1, le=65535, description="Port that the gateway listens on.")
    listening_fd: Annotated[list[int], NoDecode] = Field(
        default_factory=list,
        description="Descriptor of a socket that listens already, in place of host and port; may be repeated.",
    )
    ready_fd: int | None = Field(
        None, ge=0, description="Descriptor that is closed when the gateway listens, for whoever waits for that."
    )
    request_seconds: float = Field(
        600, gt=0, le=86_400, description="How long a request may take, unless it asks for less."
    )
    repair_seconds: float = Field(
        30, ge=0, le=3600, description="How long a request waits for a Triton that broke under it, to go on there."
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body that is read.")
    ping_seconds: float = Field(15, gt=0, description="A stream without text for so long sends a comment.")
    drain_seconds: float = Field(30, ge=0, description="How long running requests may go on after the signal to stop.")
    default_model: str = Field(
        "", description="The language model for routes that name none; empty: the first one that is ready."
    )
    load_on_demand: bool = Field(True, description="Whether a language model is loaded at its first request.")
    load_seconds: float = Field(600, gt=0, le=86_400, description="How long such a request waits for its model.")
    max_loading_requests: int = Field(256, ge=1, description="Requests that may wait so; one more gets a 503.")
    training: bool = Field(False, description="Whether callers may train language models here (POST /api/train).")
    data_folder: Path = Field(Path("data"), description="Folder with the texts that callers may train on.")
    runs_folder: Path = Field(Path("runs"), description="Folder for trainings that callers begin, and their list.")
    max_jobs: int = Field(1, ge=1, le=64, description="Trainings that run at once; the others wait.")
    registry: Path | None = Field(
        None,
        validation_alias=_also("registry", "MODEL_REGISTRY_PATH"),
        description="Registry in which a finished training is entered; default: the one that tritonlm add writes.",
    )
    api_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="Key that callers must send (Authorization: Bearer …), with every scope; beside those of the file.",
    )
    triton_authorities: Path | None = Field(
        None, description="File of certificates that vouch for Tritons at grpcs://HOST:PORT; unset: the system's."
    )
    tls_certificate: Path | None = Field(
        None, description="File with the certificate of https, and those that sign it; unset: plain http."
    )
    tls_key: Path | None = Field(None, description="File with the certificate's private key.")
    keys: Path | None = Field(
        None, description="File of keys, as tritonlm keys writes it; default: keys.json beside the registry."
    )
    allow_anonymous: bool = Field(False, description="Whether to listen beyond this machine although there is no key.")
    limits_storage: str = Field(
        "memory://",
        pattern=r"^(memory|redis|rediss)://",
        description="Where what callers have used is counted: memory://, or redis://HOST:PORT for several gateways.",
    )
    max_requests: int = Field(
        512, ge=1, description="Requests inside at once, running and waiting; one more gets a 429."
    )
    max_prompt_tokens: int = Field(
        4_000_000, ge=1, description="Tokens of their prompts at once, four bytes of a body for each; more gets a 429."
    )
    max_running: int = Field(
        128, ge=1, description="Of those, requests that are handed to Triton; the others wait, each key in its turn."
    )
    queue_seconds: float = Field(60, gt=0, description="How long a request may wait so, before it gets a 503.")
    reader_seconds: float = Field(
        30, gt=0, description="How long a stream waits for a reader who takes nothing, before it is cut."
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests that one caller, told by key or address, may send in a minute; unset: any."
    )
    repairs: Path | None = Field(
        None, description="File in which tritonlm serve counts what it has started again, for the metrics."
    )
    cors_allow_origins: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        validation_alias=_also("cors_allow_origins", "CORS_ALLOW_ORIGINS"),
        description="Origins whose pages may call the gateway (comma-separated in the environment); * for all.",
    )

    @field_validator("triton", "cors_allow_origins", "listening_fd", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
