"""Shared by the commands: the connection to Triton, output as tables or JSON, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tritonlm.access.keys import KeysError
from tritonlm.contract import (
    AdapterNotFound,
    CheckpointError,
    InvalidRequest,
    ModelNotFound,
    TritonLMError,
    Unavailable,
)
from tritonlm.serving import ServingError, paths, terminal

# Its import takes a quarter of a command's start, and half of the commands need no client.
if TYPE_CHECKING:
    from tritonlm.client.sync import Client
    from tritonlm.client.types import ModelList

FAILED, MISUSED, UNREACHABLE = 1, 2, 3
# rich uses colours and boxes on a terminal only. Without its markup: a name or a path may hold brackets.
console = Console(markup=False)
err_console = Console(stderr=True, markup=False)

Triton = Annotated[
    list[str] | None,
    typer.Option(
        "--triton",
        metavar="HOST:PORT",
        envvar="TRITONLM_TRITON",
        help="gRPC address of a Triton; may be repeated (default 127.0.0.1:8001)",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts instead of a table.")]


@contextlib.contextmanager
def connected(triton: list[str] | None) -> Iterator[Client]:
    """A client; an error is printed as one line and sets the exit code."""
    from tritonlm.client.sync import Client  # noqa: PLC0415

    try:
        with Client(addresses(triton), adapters_folder=adapters_folder()) as client:
            yield client
    except (TritonLMError, ServingError) as error:
        terminal.print_error(error)
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@contextlib.contextmanager
def errors_printed(
    misused: tuple[type[Exception], ...] = (ServingError, CheckpointError, KeysError),
) -> Iterator[None]:
    """An error is printed as one line and sets the exit code: MISUSED for those of `misused`, else `exit_code`."""
    try:
        yield
    except (TritonLMError, ServingError, KeysError, OSError) as error:
        terminal.print_error(error)
        raise typer.Exit(MISUSED if isinstance(error, misused) else exit_code(error)) from None


def addresses(triton: list[str] | None) -> list[str]:
    from tritonlm.client.async_client import DEFAULT_URL  # noqa: PLC0415

    # Of a variable that has spaces behind its commas, each word arrives as an address of its own.
    parts = [part.strip() for address in triton or [] for part in address.split(",")]
    return [part for part in parts if part] or [DEFAULT_URL]


def adapters_folder() -> Path:
    """That of the local server, so that an adapter's name alone is a model."""
    folder = os.environ.get("TRITONLM_ADAPTERS_FOLDER")
    return Path(folder) if folder else paths.adapters()


def exit_code(error: Exception) -> int:
    if isinstance(error, Unavailable):
        return UNREACHABLE
    return MISUSED if isinstance(error, (AdapterNotFound, InvalidRequest, ModelNotFound)) else FAILED


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def model_or_first(client: Client, model: str | None) -> str:
    """This model, or the first one that is ready."""
    return model if model is not None else first_ready(client.models.list())


def first_ready(models: ModelList) -> str:
    for model in models.data:
        if model.state == "ready":
            return model.id
    raise Unavailable("no language model is loaded; see tritonlm list")
