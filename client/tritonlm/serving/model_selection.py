"""Selects the language models of a server: the bundled ones, the registry's, and checkpoints named at the start.

It determines the model repositories that Triton reads and the models that are loaded at start. It starts nothing,
but models of the Hub are downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlm.checkpoints.reference import parse, split_name

from . import paths
from .adapters import REGISTRY, declare_adapters, option_adapters, registry_adapters, serve_name
from .downloads import downloaded
from .entries import sync_repository
from .errors import ServingError
from .registry import Entry, entry_of, read_registry
from .settings import Settings

BUNDLED = ("abacus", "fable")


@dataclass(frozen=True)
class ModelSelection:
    repositories: list[Path]
    # Models that are loaded at start; the others are loaded at their first request.
    load: list[str]
    # The model for routes that name none; empty: the first one that is ready.
    default: str


def select_models(settings: Settings) -> ModelSelection:
    code = paths.model_repository()
    repositories = list(settings.model_repository)
    file, registered = _registered(settings.registry)
    # Included even when it is empty, so that Triton sees models that are added later.
    repositories.append(sync_repository(str(file), registered, code))
    named = [_entry_of_option(option) for option in settings.checkpoint]
    _refuse_duplicates([*registered, *named])
    if named:
        repositories.append(sync_repository(_repository_name(named, code), named, code))
    default = named[0].name if named else ""
    declare_adapters(
        settings.adapters,
        {
            REGISTRY: registry_adapters(registered, file),
            serve_name(settings.http_port): option_adapters(settings.adapter, default),
        },
    )
    load = settings.load or [
        *(entry.name for entry in named),
        *(entry.name for entry in registered if entry.preload),
    ]
    return ModelSelection(repositories, list(dict.fromkeys(load or BUNDLED)), default)


def _registered(file: Path | None) -> tuple[Path, list[Entry]]:
    if file is not None and not file.is_file():
        raise ServingError(f"the registry {file} does not exist; name another with --registry, or tritonlm add one")
    path = (file or paths.registry()).resolve()
    return path, read_registry(path) if path.is_file() else []


def _entry_of_option(option: str) -> Entry:
    """The entry of MODEL or NAME=MODEL. A model of the Hub is downloaded, so that its processes need no network."""
    name, model = split_name(option)
    source = parse(model)
    return entry_of(source, name).at(downloaded(source))


def _repository_name(entries: Sequence[Entry], code: Path) -> str:
    """All that is written: the same option, such as `.`, means another model in another working folder."""
    return "\n".join([str(code.resolve()), *(entry.model_dump_json() for entry in entries)])


def _refuse_duplicates(entries: Sequence[Entry]) -> None:
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1 or name in BUNDLED:
            raise ServingError(f"two language models are named {name}; name one as NAME=MODEL")
