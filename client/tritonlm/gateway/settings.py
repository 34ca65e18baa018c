"""The settings of `tritonlm gateway`: names, ranges, defaults and meanings.

Each setting is a command-line option, an environment variable and a row of docs/settings.md.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from tritonlm.serving.settings import ENV_PREFIX, ObservabilitySettings


def _aliases(name: str, old_variable: str) -> AliasChoices:
    """The setting's variable, and the variable of an older system with the same meaning."""
    return AliasChoices(name, f"{ENV_PREFIX}{name.upper()}", old_variable)


class GatewaySettings(ObservabilitySettings):
    triton: Annotated[list[str], NoDecode] = Field(
        default_factory=lambda: ["127.0.0.1:8001"],
        min_length=1,
        description="gRPC address of a Triton; may be repeated (comma-separated in the environment).",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address that the gateway listens on.")
    port: int = Field(8080, ge=1, le=65535, description="Port that the gateway listens on.")
    listening_fd: Annotated[list[int], NoDecode] = Field(
        default_factory=list,
        description="Descriptor of a listening socket to use instead of host and port; may be repeated.",
    )
    ready_fd: int | None = Field(
        None, ge=0, description="Descriptor that the gateway closes when it listens, for a parent process that waits."
    )
    request_seconds: float = Field(
        600, gt=0, le=86_400, description="Time limit of a request, without the time that its model takes to load."
    )
    repair_seconds: float = Field(
        30, ge=0, le=3600, description="How long a request waits for a Triton that broke during it, to resume there."
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest accepted request body.")
    ping_seconds: float = Field(15, gt=0, description="A stream sends a comment after this time without text.")
    drain_seconds: float = Field(30, ge=0, description="How long running requests may continue after a stop signal.")
    default_model: str = Field(
        "", description="The language model for requests that name none; empty: the first one that is ready."
    )
    load_on_demand: bool = Field(True, description="Whether a language model is loaded at its first request.")
    load_seconds: float = Field(600, gt=0, le=86_400, description="How long a request waits for its model to load.")
    max_loading_requests: int = Field(
        256, ge=1, description="Limit of requests that wait for a model to load; further ones get a 503."
    )
    training: bool = Field(False, description="Whether callers may train language models (POST /api/train).")
    data_folder: Path = Field(Path("data"), description="Folder with the texts that callers may train on.")
    runs_folder: Path = Field(Path("runs"), description="Folder for the callers' training runs and the list of jobs.")
    max_jobs: int = Field(1, ge=1, le=64, description="Limit of training jobs that run at once; others are queued.")
    response_store: Path | None = Field(
        None, description="SQLite file for the responses of POST /v1/responses; unset: none is stored."
    )
    response_days: float = Field(30, gt=0, le=3650, description="How long a response stays stored.")
    response_store_bytes: int = Field(
        2**30, ge=2**20, description="Limit of the stored responses' size; the oldest make room for new ones."
    )
    batch_folder: Path | None = Field(
        None, description="Folder for the files and the progress of batches; unset: neither is offered."
    )
    batch_requests: int = Field(8, ge=1, le=256, description="Requests of batches that are sent at once.")
    batch_days: float = Field(30, gt=0, le=3650, description="How long files and ended batches are kept.")
    batch_folder_bytes: int = Field(10 * 2**30, ge=2**20, description="Limit of all uploaded files together.")
    max_file_bytes: int = Field(100 * 2**20, ge=1024, description="Largest accepted file.")
    registry: Path | None = Field(
        None,
        validation_alias=_aliases("registry", "MODEL_REGISTRY_PATH"),
        description="Registry to which trained models are added; default: the one that tritonlm add writes.",
    )
    adapters_folder: Path | None = Field(
        None,
        description="Folder of the adapters files, one for each language model; default: the one that tritonlm "
        "adapters writes.",
    )
    api_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="A key with every scope (Authorization: Bearer …), in addition to those of the key file.",
    )
    triton_authorities: Path | None = Field(
        None, description="File of CA certificates for Tritons at grpcs://HOST:PORT; unset: the system's."
    )
    tls_certificate: Path | None = Field(
        None, description="File with the certificate chain for https; unset: plain http."
    )
    tls_key: Path | None = Field(None, description="File with the certificate's private key, without a password.")
    keys: Path | None = Field(
        None, description="Key file, as written by tritonlm keys; default: keys.json beside the registry."
    )
    allow_anonymous: bool = Field(False, description="Whether to listen beyond this machine without any key.")
    limits_storage: str = Field(
        "memory://",
        pattern=r"^(memory|redis|rediss)://",
        description="Storage of the rate limits: memory://, or redis://HOST:PORT shared by several gateways.",
    )
    max_requests: int = Field(
        512, ge=1, description="Limit of requests that run or wait at once; further ones get a 429."
    )
    max_prompt_tokens: int = Field(
        4_000_000, ge=1, description="Limit of their prompt tokens, estimated from the body at four bytes per token."
    )
    max_running: int = Field(
        128, ge=1, description="Limit of requests sent to Triton at once; the others wait, shared fairly among keys."
    )
    queue_seconds: float = Field(60, gt=0, description="How long a request may wait before it gets a 503.")
    reader_seconds: float = Field(
        30, gt=0, description="How long a stream waits for a reader that does not read, before it is closed."
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests per minute of one caller (by key or address); unset: no limit."
    )
    repairs: Path | None = Field(
        None, description="File in which tritonlm serve counts restarted processes, for the metrics."
    )
    cors_allow_origins: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        validation_alias=_aliases("cors_allow_origins", "CORS_ALLOW_ORIGINS"),
        description="Origins whose pages may call the gateway (comma-separated in the environment); * for all.",
    )

    @field_validator("triton", "cors_allow_origins", "listening_fd", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("tls_certificate", "tls_key", "triton_authorities")
    @classmethod
    def _can_be_read(cls, file: Path | None) -> Path | None:
        if file is not None and (not os.access(file, os.R_OK) or file.is_dir()):
            raise ValueError("must be a file that can be read")
        return file

    @field_validator("batch_folder")
    @classmethod
    def _can_be_written(cls, folder: Path | None) -> Path | None:
        """The folder, or the nearest one above it, in which it will be created."""
        if folder is not None:
            existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
            if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
                raise ValueError("must be a folder that can be written")
        return folder

    @model_validator(mode="after")
    def _has_a_certificate_with_its_key(self) -> GatewaySettings:
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError("--tls-key (TRITONLM_TLS_KEY) needs --tls-certificate (TRITONLM_TLS_CERTIFICATE)")
        self.tls_context()
        return self

    def tls_context(self) -> ssl.SSLContext | None:
        """With what a server encrypts; None without a certificate."""
        if self.tls_certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # Without a password ssl asks for one on the terminal where the key is encrypted.
            context.load_cert_chain(self.tls_certificate, self.tls_key, password=lambda: "")
        except OSError as error:
            files = f"--tls-certificate {self.tls_certificate}, --tls-key {self.tls_key}"
            raise ValueError(f"{files}: not a certificate with its private key in PEM format ({error})") from None
        return context
