"""`tritonlm keys create, list, revoke`: manages API keys. `tritonlm.access.keys` defines the rules."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tritonlm.access.keys import INFER, Key, KeyFile, Limits
from tritonlm.serving import paths

from .common import AsJson, console, err_console, errors_printed, print_json

app = typer.Typer(
    help="Create, list and revoke API keys of the gateway.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

File = Annotated[
    Path | None,
    typer.Option("--keys", envvar="TRITONLM_KEYS", help="the key file (default: keys.json beside the registry)"),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="the owner's name, as logs and usage show it")]


@app.command()
def create(
    name: Name,
    scope: Annotated[list[str] | None, typer.Option(help="infer, admin or metrics; may be repeated")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="requests allowed per minute")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="tokens allowed per minute")] = None,
    running_requests: Annotated[int | None, typer.Option(min=1, help="concurrent requests allowed")] = None,
    keys: File = None,
) -> None:
    """Create a key and print it once. As soon as one key exists, the gateway requires a key for every request."""
    limits = Limits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, running_requests=running_requests
    )
    with errors_printed():
        secret = _file(keys).create(name, scope or [INFER], limits)
    err_console.print(f"the key of {name}; it is not shown again:")
    print(secret)


@app.command("list")
def list_keys(keys: File = None, as_json: AsJson = False) -> None:
    """List the keys: names, scopes, limits, never the keys themselves."""
    with errors_printed():
        entries = _file(keys).read()
    if as_json:
        print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in entries])
        return
    table = Table("name", "scopes", "requests/min", "tokens/min", "running", "created", "state")
    for key in entries:
        table.add_row(*_row(key))
    console.print(table)


@app.command()
def revoke(name: Name, keys: File = None) -> None:
    """Revoke a key. Running gateways apply this within a second."""
    with errors_printed():
        _file(keys).revoke(name)
    console.print(f"the key of {name} is revoked")


def _file(path: Path | None) -> KeyFile:
    return KeyFile(path or paths.keys())


def _row(key: Key) -> list[str]:
    limits = (key.limits.requests_per_minute, key.limits.tokens_per_minute, key.limits.running_requests)
    state = "valid" if key.revoked is None else f"revoked {_day(key.revoked)}"
    return [key.name, ", ".join(key.scopes), *("–" if n is None else str(n) for n in limits), _day(key.created), state]


def _day(moment: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))
