"""The command line of `tritonlm`: parses options and turns errors into one line and an exit code.

`serve` and `gateway` are defined here. The other commands are imported on use, so that a server starts sooner.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_settings import BaseSettings
from typer.core import TyperGroup

from tritonlm import __version__
from tritonlm.access.exposure import exposure_problem
from tritonlm.contract import TritonLMError
from tritonlm.contract.imports import without_collections, without_modules
from tritonlm.gateway.settings import GatewaySettings
from tritonlm.serving import ServingError, Settings, paths, read_settings, terminal
from tritonlm.serving.placeholder import PlaceholderListener
from tritonlm.serving.ports import check_port, reachable_host
from tritonlm.serving.settings import env_name, option_name, read_settings_of

# The other commands: a module of `tritonlm.commands`, and the command function or Typer group in it.
_LAZY_COMMANDS = {
    "list": ("models", "list_models"),
    "status": ("models", "status"),
    "load": ("models", "load"),
    "unload": ("models", "unload"),
    "add": ("registry", "add"),
    "remove": ("registry", "remove"),
    "adapters": ("adapters", "app"),
    "pull": ("checkpoints", "pull"),
    "inspect": ("inspect", "inspect"),
    "quantize": ("quantize", "quantize"),
    "generate": ("text", "generate"),
    "complete": ("text", "complete"),
    "embed": ("text", "embed"),
    "compare": ("compare", "compare"),
    "chat": ("chat", "chat"),
    "train": ("train", "train"),
    "jobs": ("jobs", "app"),
    "keys": ("keys", "app"),
    "bench": ("bench", "bench"),
    "doctor": ("doctor", "doctor"),
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_LAZY_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _LAZY_COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, name = _LAZY_COMMANDS[cmd_name]
        command = getattr(import_module(f"tritonlm.commands.{module}"), name)
        if not isinstance(command, typer.Typer):
            group = typer.Typer(rich_markup_mode=None, add_completion=False)
            group.command(cmd_name)(command)
            command = group
        return typer.main.get_command(command)


# Plain help and errors, identical in a log and on a terminal.
app = typer.Typer(
    cls=_Commands,
    help="Serve Hugging Face causal language models from a Triton model repository.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _setting(field: str, metavar: str | None = None, *names: str, settings_type: type[BaseSettings] = Settings) -> Any:
    """The option of a setting, with the setting's description and default as help."""
    info = settings_type.model_fields[field]
    default = info.get_default(call_default_factory=True)
    shown = ", ".join(map(str, default)) if isinstance(default, list) else default
    suffix = f"(env {env_name(field)}" + (f", default {shown})" if default is not None else ")")
    return typer.Option(
        *(names or [option_name(field)]), help=f"{info.description} {suffix}", metavar=metavar, show_default=False
    )


def _gateway_setting(field: str, metavar: str) -> Any:
    return _setting(field, metavar, settings_type=GatewaySettings)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"tritonlm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve Hugging Face causal language models from a Triton model repository."""


# Options are strings: the settings parse and validate them, as they do for environment variables.
@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a GGUF file, or a model of the Hugging Face Hub (ORG/NAME, ORG/NAME@REVISION, "
            "ORG/NAME:Q4_K_M). NAME=MODEL serves it under this name. Default: the bundled models.",
            show_default=False,
        ),
    ] = None,
    *,
    host: Annotated[str | None, _setting("host", "ADDRESS")] = None,
    port: Annotated[str | None, _setting("port", "PORT")] = None,
    gateway: Annotated[bool | None, _setting("gateway", None, "--gateway/--no-gateway")] = None,
    triton_host: Annotated[str | None, _setting("triton_host", "ADDRESS")] = None,
    http_port: Annotated[str | None, _setting("http_port", "PORT")] = None,
    grpc_port: Annotated[str | None, _setting("grpc_port", "PORT")] = None,
    metrics_port: Annotated[str | None, _setting("metrics_port", "PORT")] = None,
    device: Annotated[str | None, _setting("device", "DEVICE")] = None,
    runner: Annotated[str | None, _setting("runner", "auto|native|graphs|reference")] = None,
    dtype: Annotated[str | None, _setting("dtype", "auto|float32|bfloat16|float16")] = None,
    weights: Annotated[str | None, _setting("weights", "auto|full|int8|int4|fp8")] = None,
    kv_dtype: Annotated[str | None, _setting("kv_dtype", "auto|int8")] = None,
    model_repository: Annotated[list[Path] | None, _setting("model_repository", "FOLDER")] = None,
    registry: Annotated[Path | None, _setting("registry", "FILE")] = None,
    checkpoint: Annotated[list[str] | None, _setting("checkpoint", "[NAME=]MODEL")] = None,
    adapter: Annotated[list[str] | None, _setting("adapter", "[LM:]NAME=PATH")] = None,
    adapters_folder: Annotated[Path | None, _setting("adapters_folder", "FOLDER")] = None,
    load: Annotated[list[str] | None, _setting("load", "NAME")] = None,
    reload: Annotated[bool | None, _setting("reload", None, "--reload/--no-reload")] = None,
    max_context_tokens: Annotated[str | None, _setting("max_context_tokens", "N")] = None,
    max_sequences: Annotated[str | None, _setting("max_sequences", "N")] = None,
    kv_cache_tokens: Annotated[str | None, _setting("kv_cache_tokens", "N")] = None,
    speculative_tokens: Annotated[str | None, _setting("speculative_tokens", "N")] = None,
    memory_budget: Annotated[str | None, _setting("memory_budget", "SIZE")] = None,
    idle_unload_seconds: Annotated[str | None, _setting("idle_unload_seconds", "SECONDS")] = None,
    enable_embeddings: Annotated[bool | None, _setting("enable_embeddings")] = None,
    training: Annotated[bool | None, _setting("training", None, "--training/--no-training")] = None,
    log_level: Annotated[str | None, _setting("log_level", "debug|info|warning|error")] = None,
    log_format: Annotated[str | None, _setting("log_format", "auto|text|json")] = None,
    logs: Annotated[str | None, _setting("logs", "auto|files|stderr")] = None,
    otlp_endpoint: Annotated[str | None, _setting("otlp_endpoint", "URL")] = None,
    load_seconds: Annotated[str | None, _setting("load_seconds", "SECONDS")] = None,
    drain_seconds: Annotated[str | None, _setting("drain_seconds", "SECONDS")] = None,
) -> None:
    """Start a local Triton and the gateway, load language models and serve until Ctrl-C or SIGTERM."""
    options = dict(locals())
    options["checkpoint"] = [*(options.pop("models") or []), *(checkpoint or [])]
    try:
        settings = read_settings(options)
        own = settings_of_gateway(settings)
    except ServingError as error:
        terminal.print_error(error)
        raise typer.Exit(2) from None
    try:
        with PlaceholderListener(own.host, own.port, own.tls_context()) if own else nullcontext() as placeholder:
            # httpx's command line takes more than half of its import.
            with without_collections(), without_modules("httpx._main"):
                # After the port is open.
                from tritonlm.serving.supervisor import serve as serve_until_stopped  # noqa: PLC0415

            serve_until_stopped(settings, url_of(own) if own else "", placeholder)
    except (ServingError, TritonLMError, OSError) as error:
        terminal.print_error(error)
        raise typer.Exit(1) from None


def settings_of_gateway(settings: Settings) -> GatewaySettings | None:
    """Those of the gateway that will be a child process; None without one.

    Refuses what it would refuse: its settings, and an open address without a key.
    """
    if not settings.gateway:
        return None
    own = read_settings_of(GatewaySettings, {"host": settings.host, "port": settings.port})
    secret = own.api_key.get_secret_value() if own.api_key else None
    if problem := exposure_problem(own.host, own.keys or paths.keys(), secret, own.allow_anonymous):
        raise ServingError(problem)
    return own


def url_of(gateway: GatewaySettings) -> str:
    """Where it will listen."""
    return f"{'https' if gateway.tls_certificate else 'http'}://{reachable_host(gateway.host)}:{gateway.port}"


@app.command("gateway")
def run_gateway(
    *,
    triton: Annotated[list[str] | None, _gateway_setting("triton", "HOST:PORT")] = None,
    host: Annotated[str | None, _gateway_setting("host", "ADDRESS")] = None,
    port: Annotated[str | None, _gateway_setting("port", "PORT")] = None,
    listening_fd: Annotated[list[str] | None, _gateway_setting("listening_fd", "N")] = None,
    ready_fd: Annotated[str | None, _gateway_setting("ready_fd", "N")] = None,
    request_seconds: Annotated[str | None, _gateway_setting("request_seconds", "SECONDS")] = None,
    max_body_bytes: Annotated[str | None, _gateway_setting("max_body_bytes", "BYTES")] = None,
    ping_seconds: Annotated[str | None, _gateway_setting("ping_seconds", "SECONDS")] = None,
    drain_seconds: Annotated[str | None, _gateway_setting("drain_seconds", "SECONDS")] = None,
    default_model: Annotated[str | None, _gateway_setting("default_model", "NAME")] = None,
    load_on_demand: Annotated[
        bool | None,
        _setting("load_on_demand", None, "--load-on-demand/--no-load-on-demand", settings_type=GatewaySettings),
    ] = None,
    load_seconds: Annotated[str | None, _gateway_setting("load_seconds", "SECONDS")] = None,
    max_loading_requests: Annotated[str | None, _gateway_setting("max_loading_requests", "N")] = None,
    training: Annotated[
        bool | None, _setting("training", None, "--training/--no-training", settings_type=GatewaySettings)
    ] = None,
    data_folder: Annotated[Path | None, _gateway_setting("data_folder", "FOLDER")] = None,
    runs_folder: Annotated[Path | None, _gateway_setting("runs_folder", "FOLDER")] = None,
    max_jobs: Annotated[str | None, _gateway_setting("max_jobs", "N")] = None,
    response_store: Annotated[Path | None, _gateway_setting("response_store", "FILE")] = None,
    response_days: Annotated[str | None, _gateway_setting("response_days", "DAYS")] = None,
    response_store_bytes: Annotated[str | None, _gateway_setting("response_store_bytes", "BYTES")] = None,
    batch_folder: Annotated[Path | None, _gateway_setting("batch_folder", "FOLDER")] = None,
    batch_requests: Annotated[str | None, _gateway_setting("batch_requests", "N")] = None,
    batch_days: Annotated[str | None, _gateway_setting("batch_days", "DAYS")] = None,
    batch_folder_bytes: Annotated[str | None, _gateway_setting("batch_folder_bytes", "BYTES")] = None,
    max_file_bytes: Annotated[str | None, _gateway_setting("max_file_bytes", "BYTES")] = None,
    registry: Annotated[Path | None, _gateway_setting("registry", "FILE")] = None,
    adapters_folder: Annotated[Path | None, _gateway_setting("adapters_folder", "FOLDER")] = None,
    api_key: Annotated[str | None, _gateway_setting("api_key", "KEY")] = None,
    keys: Annotated[Path | None, _gateway_setting("keys", "FILE")] = None,
    allow_anonymous: Annotated[
        bool | None, _setting("allow_anonymous", None, "--allow-anonymous/--keys-only", settings_type=GatewaySettings)
    ] = None,
    triton_authorities: Annotated[Path | None, _gateway_setting("triton_authorities", "FILE")] = None,
    tls_certificate: Annotated[Path | None, _gateway_setting("tls_certificate", "FILE")] = None,
    tls_key: Annotated[Path | None, _gateway_setting("tls_key", "FILE")] = None,
    requests_per_minute: Annotated[str | None, _gateway_setting("requests_per_minute", "N")] = None,
    limits_storage: Annotated[str | None, _gateway_setting("limits_storage", "URI")] = None,
    max_requests: Annotated[str | None, _gateway_setting("max_requests", "N")] = None,
    max_prompt_tokens: Annotated[str | None, _gateway_setting("max_prompt_tokens", "N")] = None,
    max_running: Annotated[str | None, _gateway_setting("max_running", "N")] = None,
    queue_seconds: Annotated[str | None, _gateway_setting("queue_seconds", "SECONDS")] = None,
    reader_seconds: Annotated[str | None, _gateway_setting("reader_seconds", "SECONDS")] = None,
    repair_seconds: Annotated[str | None, _gateway_setting("repair_seconds", "SECONDS")] = None,
    log_format: Annotated[str | None, _gateway_setting("log_format", "auto|text|json")] = None,
    otlp_endpoint: Annotated[str | None, _gateway_setting("otlp_endpoint", "URL")] = None,
    repairs: Annotated[Path | None, _gateway_setting("repairs", "FILE")] = None,
    cors_allow_origins: Annotated[list[str] | None, _gateway_setting("cors_allow_origins", "ORIGIN")] = None,
) -> None:
    """Serve OpenAI's API in front of one or several Tritons until Ctrl-C or SIGTERM."""
    options = dict(locals())
    try:
        with without_collections():
            from tritonlm.gateway.serve import serve as serve_gateway  # noqa: PLC0415 (in an optional extra)
    except ModuleNotFoundError as missing:
        terminal.print_error(ServingError(f"{missing.name} is missing; pip install 'tritonlm[gateway]'"))
        raise typer.Exit(1) from None
    try:
        settings = read_settings_of(GatewaySettings, options)
        if not settings.listening_fd:
            check_port(settings.host, settings.port, "the gateway", "port")
        serve_gateway(settings)
    except (ServingError, OSError) as error:
        terminal.print_error(error)
        raise typer.Exit(2 if isinstance(error, ServingError) else 1) from None


if __name__ == "__main__":
    app()
