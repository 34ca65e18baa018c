"""`tritonlm adapters add, list, remove`: edits the adapters files; a running server sees the change at once.

`merge` has a module of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tritonlm.checkpoints.adapter_files import adapter_folder
from tritonlm.client.model_names import ModelNames
from tritonlm.contract import InvalidRequest
from tritonlm.contract.adapters_file import AdapterEntry, adapters_file, add_adapter, check_name, remove_adapter
from tritonlm.serving import ServingError, paths
from tritonlm.serving.downloads import shown_progress
from tritonlm.serving.model_selection import BUNDLED
from tritonlm.serving.registry import NAME, read_registry

from .common import AsJson, console, errors_printed, print_json
from .merge import merge

app = typer.Typer(
    help="Add, list, remove and merge LoRA adapters of language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
app.command()(merge)
Name = Annotated[str, typer.Argument(metavar="NAME", help="the adapter's name, which requests send as their model")]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--adapters-folder",
        envvar="TRITONLM_ADAPTERS_FOLDER",
        help="folder of the adapters files; default: the one that tritonlm serve reads",
        show_default=False,
    ),
]


@app.command()
def add(
    name: Name,
    base: Annotated[str, typer.Option(metavar="LM", help="the language model that it adapts")],
    path: Annotated[str, typer.Option(metavar="PATH", help="its folder in PEFT's format, or ORG/NAME of the Hub")],
    replace: Annotated[bool, typer.Option("--replace", help="replace an adapter of the same name")] = False,
    folder: Folder = None,
) -> None:
    """Add an adapter to a language model; the engine loads it at its first request."""
    with errors_printed():
        check_name(name)
        _refuse_taken(name, base, folder or paths.adapters())
        with shown_progress(path) as progress:
            files, source = adapter_folder(path, progress=progress)
        entry = AdapterEntry(str(files.resolve()), source)
        try:
            add_adapter(_file(folder, base), name, entry, replace=replace)
        except InvalidRequest:
            raise ServingError(f"{base} has an adapter {name} already; --replace replaces it") from None
    console.print(f"{name} is an adapter of {base}; it is loaded at its first request")


@app.command("list")
def list_adapters(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the adapters of all language models."""
    with errors_printed():
        known = ModelNames(folder or paths.adapters()).adapters()
    rows = [(name, lm, entry) for lm, adapters in known.items() for name, entry in adapters.items()]
    if as_json:
        print_json([{"name": name, "base": lm, "path": entry.path, "source": entry.source} for name, lm, entry in rows])
        return
    table = Table("adapter", "base", "from")
    for name, lm, entry in rows:
        table.add_row(name, lm, entry.source or entry.path)
    console.print(table)


@app.command()
def remove(
    name: Name,
    base: Annotated[str | None, typer.Option(metavar="LM", help="its language model, where several have it")] = None,
    folder: Folder = None,
) -> None:
    """Remove an adapter and keep its folder. Requests that run end with it."""
    with errors_printed():
        bases = ModelNames(folder or paths.adapters()).bases(name, base)
        if not bases:
            of = f"adapter {name} of {base}" if base else f"adapter {name}"
            raise ServingError(f"there is no {of}; tritonlm adapters list shows them")
        if len(bases) > 1:
            raise ServingError(f"{' and '.join(bases)} have an adapter {name}; name one of them with --base")
        remove_adapter(_file(folder, bases[0]), name)
    console.print(f"{name} is no adapter of {bases[0]} any more")


def _refuse_taken(name: str, base: str, folder: Path) -> None:
    """A name stands for one model: a request may send it alone."""
    if not re.fullmatch(NAME, base):
        raise ServingError(f"--base must be the name of a language model (got {base!r})")
    registry = paths.registry()
    models = [*BUNDLED, *(entry.name for entry in read_registry(registry))] if registry.is_file() else [*BUNDLED]
    if owner := ModelNames(folder).owner(name, [*models, base], base):
        raise ServingError(f"{name} is {owner} already; choose another name")


def _file(folder: Path | None, base: str) -> Path:
    return adapters_file((folder or paths.adapters()).resolve(), base)
