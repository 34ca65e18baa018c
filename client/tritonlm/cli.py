"""`tritonlm …`: options in, one line of error and an exit code out. What a command does is its room's matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm import __version__
from tritonlm.contract import TritonLMError
from tritonlm.serving import ServingError, Settings, read_settings, terminal
from tritonlm.serving import serve as serve_until_stopped
from tritonlm.serving.settings import env_name, option_name

# Plain help and errors: they read the same in a log as on a terminal.
app = typer.Typer(
    help="Serve Hugging Face causal language models from a Triton model repository.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _setting(field: str, metavar: str | None = None) -> Any:
    """The option of a setting, told as the settings tell it."""
    info = Settings.model_fields[field]
    default = info.get_default(call_default_factory=True)
    shown = ", ".join(map(str, default)) if isinstance(default, list) else default
    tail = f"(env {env_name(field)}" + (f", default {shown})" if default is not None else ")")
    return typer.Option(option_name(field), help=f"{info.description} {tail}", metavar=metavar, show_default=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tritonlm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve Hugging Face causal language models from a Triton model repository."""


# Values are read as text: the settings check them, the same for an option as for a variable.
@app.command()
def serve(
    *,
    host: Annotated[str | None, _setting("host", "ADDRESS")] = None,
    http_port: Annotated[str | None, _setting("http_port", "PORT")] = None,
    grpc_port: Annotated[str | None, _setting("grpc_port", "PORT")] = None,
    metrics_port: Annotated[str | None, _setting("metrics_port", "PORT")] = None,
    device: Annotated[str | None, _setting("device", "auto|cpu|cuda")] = None,
    dtype: Annotated[str | None, _setting("dtype", "auto|float32|bfloat16|float16")] = None,
    model_repository: Annotated[list[Path] | None, _setting("model_repository", "FOLDER")] = None,
    load: Annotated[list[str] | None, _setting("load", "NAME")] = None,
    max_sequences: Annotated[str | None, _setting("max_sequences", "N")] = None,
    kv_cache_tokens: Annotated[str | None, _setting("kv_cache_tokens", "N")] = None,
    log_level: Annotated[str | None, _setting("log_level", "debug|info|warning|error")] = None,
    load_seconds: Annotated[str | None, _setting("load_seconds", "SECONDS")] = None,
    drain_seconds: Annotated[str | None, _setting("drain_seconds", "SECONDS")] = None,
) -> None:
    """Start a local Triton, load language models into it and serve until Ctrl-C or SIGTERM."""
    given = dict(locals())
    try:
        settings = read_settings(given)
    except ServingError as error:
        terminal.explain(error)
        raise typer.Exit(2) from None
    try:
        serve_until_stopped(settings)
    except (ServingError, TritonLMError, OSError) as error:
        terminal.explain(error)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
