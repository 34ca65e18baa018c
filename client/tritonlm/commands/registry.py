"""`tritonlm add, remove`: edits the registry; a running server sees the change at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.checkpoints.reference import Source, parse
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.client.model_names import ModelNames
from tritonlm.contract import Checkpoint
from tritonlm.serving import ServingError, paths
from tritonlm.serving.downloads import downloaded
from tritonlm.serving.entries import sync_registry, write_entry
from tritonlm.serving.registry import add_entry, entry_of, remove_entry

from .common import adapters_folder, console, errors_printed

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
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="a folder, a GGUF file, or ORG/NAME, ORG/NAME:Q4_K_M of the Hub")
    ],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit on the Hub")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="of the KV cache: auto or int8")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, or devices: cuda:0,cuda:1")] = None,
    max_context_tokens: Annotated[int | None, typer.Option(help="its longest context")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="slots: sequences that run together")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="tokens that its KV cache holds")] = None,
    max_queue_size: Annotated[int | None, typer.Option(help="requests that may wait for a slot")] = None,
    queue_seconds: Annotated[float | None, typer.Option(help="how long a request may wait")] = None,
    idle_unload_seconds: Annotated[
        float | None, typer.Option(help="the gateway unloads it after this time without a request")
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option(help="how it writes tool calls; default: recognized from its chat template")
    ] = None,
    preload: Annotated[bool, typer.Option(help="load it at the start, not at its first request")] = False,
    repository: Annotated[
        Path | None, typer.Option(help="write it into this model repository instead, for another Triton")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="with --repository: copy files instead of linking them")] = False,
    registry: File = None,
) -> None:
    """Register a language model and write the files that Triton needs to serve it."""
    settings: dict[str, Any] = {
        "dtype": dtype, "kv_dtype": kv_dtype, "device": device, "max_context_tokens": max_context_tokens,
        "max_sequences": max_sequences, "kv_cache_tokens": kv_cache_tokens, "max_queue_size": max_queue_size,
        "queue_seconds": queue_seconds, "idle_unload_seconds": idle_unload_seconds,
        "tool_format": tool_format,
    }  # fmt: skip
    with errors_printed():
        _refuse_adapter(name)
        source = parse(model)
        entry = entry_of(_at_revision(source, revision), name, preload=preload, **settings)
        if entry.path is not None:
            Checkpoint(folder_of(entry.path)).check()
        if repository is not None:
            # A copy holds a folder: a GGUF file's prepared one, or what the Hub's cache has.
            complete = entry.at(folder_of(downloaded(entry.source))) if copy else entry
            write_entry(complete, repository, paths.model_repository(), copy)
            console.print(f"{name} is in {repository}")
            return
        if copy:
            raise ServingError("--copy needs --repository: the local server reads the checkpoint from its folder")
        file = registry or paths.registry()
        add_entry(file, entry)
        sync_registry(file)
    console.print(f"{name} is registered; it is loaded at its first request")


def remove(name: Name, registry: File = None) -> None:
    """Remove a language model from the registry and keep its checkpoint. Unload it first if it is loaded."""
    with errors_printed():
        file = registry or paths.registry()
        remove_entry(file, name)
        sync_registry(file)
    console.print(f"{name} is removed from the registry")


def _refuse_adapter(name: str) -> None:
    """A name stands for one model: that of an adapter alone would name this one."""
    if owner := ModelNames(adapters_folder()).owner(name):
        raise ServingError(f"{name} is {owner} already; choose another name")


def _at_revision(source: Source, revision: str | None) -> Source:
    if revision is None:
        return source
    if isinstance(source, Path):
        raise ServingError(f"--revision is for a model of the Hub; {source} is on this machine")
    return replace(source, revision=revision)
