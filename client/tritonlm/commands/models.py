"""`tritonlm list, status, load, unload`: lists, inspects, loads and unloads language models."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tritonlm.client.types import Model

from .common import FAILED, AsJson, Triton, connected, console, err_console, print_json
from .watch import watch

Name = Annotated[str, typer.Argument(metavar="NAME", help="the language model")]
_COUNTERS = (
    "running",
    "waiting",
    "finished",
    "cancelled",
    "failed",
    "refused",
    "generated_tokens",
    "blocks_used",
    "blocks",
)


def list_models(triton: Triton = None, as_json: AsJson = False) -> None:
    """List the language models and their adapters, and their state."""
    with connected(triton) as client:
        models = client.models.with_adapters().data
    if as_json:
        print_json([model.to_dict() for model in models])
        return
    table = Table("model", "state", "context", "device", "dtype", "running", "waiting", "slots", "memory")
    for model in models:
        table.add_row(*_row(model))
    console.print(table)


def _row(model: Model) -> list[str]:
    numbers = (model.max_model_len, model.device, model.dtype, model.running, model.waiting, model.slots)
    state = model.state if model.reason is None else f"{model.state}: {model.reason}"
    # Memory now, and at most.
    sizes = [size for size in (model.memory_bytes, model.memory_reserved_bytes) if size is not None]
    memory = f"{' / '.join(f'{size / 2**20:,.0f}' for size in sizes)} MiB" if sizes else "–"
    name = f"{model.id} (adapter of {model.parent})" if model.parent else model.id
    return [name, state, *("–" if value is None else str(value) for value in numbers), memory]


def status(
    triton: Triton = None,
    as_json: AsJson = False,
    watching: Annotated[bool, typer.Option("--watch", help="Show load and throughput continuously.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="With --watch: the interval.")] = 1.0,
) -> None:
    """Show whether Triton and its engines respond, and their counters. Exit code 1 when no model is ready."""
    with connected(triton) as client:
        if watching:
            watch(client, every, as_json)
        health = client.health()
        reports = {name: client.status(name) for name in health.models}
    if as_json:
        print_json({**health.to_dict(), "engines": reports})
    else:
        console.print(f"Triton {'answers' if health.live else 'does not answer'}; {len(reports)} language models ready")
        for name, report in reports.items():
            table = Table("counter", name)
            for counter in _COUNTERS:
                table.add_row(counter.replace("_", " "), str(report[counter]))
            console.print(table)
    if not health.ready:
        raise typer.Exit(FAILED)


def load(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="the language model; required")] = None,
    triton: Triton = None,
    as_json: AsJson = False,
    model_type: Annotated[str | None, typer.Option("--model_type", hidden=True)] = None,
    model_path: Annotated[str | None, typer.Option("--model_path", hidden=True)] = None,
) -> None:
    """Load a language model, or reload it when its checkpoint has changed on disk."""
    # The command line of an older system has options for the name.
    name = name or model_type or (model_path or "").rstrip("/").rpartition("/")[2]
    if not name:
        raise typer.BadParameter("name a language model; tritonlm list shows them")
    with connected(triton) as client, err_console.status(escape(f"loading {name} …")):
        model = client.models.load(name)
    print_json(model.to_dict()) if as_json else console.print(f"{name} is {model.state}")


def unload(name: Name, triton: Triton = None, as_json: AsJson = False) -> None:
    """Unload a language model."""
    with connected(triton) as client, err_console.status(escape(f"unloading {name} …")):
        client.models.retrieve(name)
        model = client.models.unload(name)
    print_json(model.to_dict()) if as_json else console.print(f"{name} is {model.state}")
