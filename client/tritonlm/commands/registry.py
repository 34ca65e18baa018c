"""`tritonlm add, remove`: the registry's entries, edited; a server that runs finds them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.checkpoint import HUB
from tritonlm.serving import ServingError, paths, terminal
from tritonlm.serving.entries import repository_of, write_entry
from tritonlm.serving.registry import Entry, add_entry, make_entry, read_registry, remove_entry

from .common import FAILED, MISUSED, console, notes

Name = Annotated[str, typer.Argument(metavar="NAME", help="the language model's name in every API")]
File = Annotated[
    Path | None,
    typer.Option(
        "--registry",
        envvar=["TRITONLM_REGISTRY", "MODEL_REGISTRY_PATH"],
        help="the registry to edit, YAML or JSON; default: the one that tritonlm serve reads",
        show_default=False,
    ),
]


def add(
    name: Name,
    model: Annotated[str, typer.Option(metavar="FOLDER|HUB-ID", help="a checkpoint's folder, or its id on the Hub")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit on the Hub")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, or devices: cuda:0,cuda:1")] = None,
    max_context_tokens: Annotated[int | None, typer.Option(help="its longest context")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="places: sequences that run together")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="tokens that its KV cache holds")] = None,
    max_queue_size: Annotated[int | None, typer.Option(help="requests that may wait for a place")] = None,
    queue_seconds: Annotated[float | None, typer.Option(help="how long one may wait")] = None,
    idle_unload_seconds: Annotated[
        float | None, typer.Option(help="after so long without a request the gateway unloads it")
    ] = None,
    preload: Annotated[bool, typer.Option(help="load it at the start, not at its first request")] = False,
    repository: Annotated[
        Path | None, typer.Option(help="write it into this model repository instead, for a Triton of yours")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="with --repository: copy, link nothing")] = False,
    registry: File = None,
) -> None:
    """Register a language model, and write what Triton needs to serve it."""
    folder = Path(model).expanduser()
    settings: dict[str, Any] = {
        "revision": revision, "dtype": dtype, "device": device, "max_context_tokens": max_context_tokens,
        "max_sequences": max_sequences, "kv_cache_tokens": kv_cache_tokens, "max_queue_size": max_queue_size,
        "queue_seconds": queue_seconds, "idle_unload_seconds": idle_unload_seconds,
    }  # fmt: skip
    with _explained():
        source: dict[str, Any] = {"path": folder.resolve()} if folder.exists() else {"hf_repo": model}
        entry = make_entry(name=name, preload=preload, **source, **settings)
        if entry.path is not None:
            Checkpoint(entry.path).check()
        if repository is not None:
            write_entry(_fetched(entry) if copy else entry, repository, paths.model_repository(), copy)
            console.print(f"{name} is in {repository}")
            return
        if copy:
            raise ServingError("--copy is for --repository: the server here reads the checkpoint where it lies")
        file = registry or paths.registry()
        add_entry(file, entry)
        _bring_up_to_date(file)
    console.print(f"{name} is registered; it is loaded at its first request")


def remove(name: Name, registry: File = None) -> None:
    """Take a language model out of the registry; its checkpoint stays. Unload it first where it is loaded."""
    with _explained():
        file = registry or paths.registry()
        remove_entry(file, name)
        _bring_up_to_date(file)
    console.print(f"{name} is not registered any more")


def _bring_up_to_date(file: Path) -> None:
    """A server that has started with this registry reads the same folder."""
    repository_of(str(file.resolve()), read_registry(file), paths.model_repository())


def _fetched(entry: Entry) -> Entry:
    if entry.hf_repo is None:
        return entry
    from tritonlm.checkpoints.hub import fetch  # noqa: PLC0415 (slow to import)

    with notes.status(f"fetching {entry.hf_repo} …"):
        found = fetch(f"{HUB}{entry.hf_repo}@{entry.revision or 'main'}")
    return entry.model_copy(update={"path": found, "hf_repo": None, "revision": None})


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What is wrong becomes one line and an exit code."""
    try:
        yield
    except (ServingError, CheckpointError, OSError) as error:
        terminal.explain(error)
        raise typer.Exit(FAILED if isinstance(error, OSError) else MISUSED) from None
