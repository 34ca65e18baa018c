"""`tritonlm keys create, list, revoke`: who may call the gateway. The rules are `tritonlm.access.keys`' own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tritonlm.access.keys import INFER, Key, KeyFile, KeysError, Limits
from tritonlm.serving import paths, terminal

from .common import MISUSED, AsJson, console, notes, print_json

app = typer.Typer(
    help="Who may call the gateway: create, list and revoke API keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

File = Annotated[
    Path | None,
    typer.Option("--keys", envvar="TRITONLM_KEYS", help="the file of keys (default: keys.json beside the registry)"),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="whose key it is, as logs and usage will name it")]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (KeysError, OSError) as error:
        terminal.explain(error)
        raise typer.Exit(MISUSED) from None


@app.command()
def create(
    name: Name,
    scope: Annotated[list[str] | None, typer.Option(help="infer, admin or metrics; may be repeated")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="requests it may send in a minute")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="tokens, prompts' and answers'")] = None,
    running_requests: Annotated[int | None, typer.Option(min=1, help="requests that may run at once")] = None,
    keys: File = None,
) -> None:
    """Make a key and show it, this once. From the first key on, the gateway wants one of every caller."""
    limits = Limits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, running_requests=running_requests
    )
    with _explained():
        secret = _file(keys).create(name, scope or [INFER], limits)
    notes.print(f"the key of {name}; it is shown only now:")
    print(secret)


@app.command("list")
def list_keys(keys: File = None, as_json: AsJson = False) -> None:
    """List the keys: names, scopes, limits, never the keys themselves."""
    with _explained():
        found = _file(keys).read()
    if as_json:
        print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in found])
        return
    table = Table("name", "scopes", "requests/min", "tokens/min", "running", "created", "state")
    for key in found:
        table.add_row(*_row(key))
    console.print(table)


@app.command()
def revoke(name: Name, keys: File = None) -> None:
    """Take a key back. Running gateways follow within a second."""
    with _explained():
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
