"""Selects the language models of a server: the bundled ones, the registry's, and checkpoints named at the start.

`select_models` only reads. `download_models` downloads what the Hub's cache lacks. `write_models` writes the model
repositories that Triton reads and the adapters files that engines follow, which a running server may use too. None
contacts Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tritonlm.checkpoints.reference import Source, parse, split_name
from tritonlm.contract.parts import GENERATE

from . import paths
from .adapters import Declared, declare_adapters, option_adapters, registry_adapters, registry_name, serve_name
from .downloads import downloaded
from .entries import sync_registry, sync_repository
from .errors import ServingError
from .registry import Entry, entry_of, read_registry
from .repository import LanguageModel, find_language_model
from .settings import Settings

BUNDLED = ("abacus", "fable")


@dataclass(frozen=True)
class ModelSelection:
    registry: Path
    registered: Sequence[Entry]
    # The models of the command, by the names under which they are served.
    named: Mapping[str, Source]
    # The adapters of the command.
    adapters: Sequence[Declared]
    # Models that are loaded at start; the others are loaded at their first request.
    load: Sequence[str]

    @property
    def default(self) -> str:
        """The model for routes that name none; empty: the first one that is ready."""
        return next(iter(self.named), "")


def select_models(settings: Settings) -> ModelSelection:
    file, registered = _registered(settings.registry)
    named = [_named(option) for option in settings.checkpoint]
    names = [name for name, _ in named]
    _refuse_duplicates([*(entry.name for entry in registered), *names])
    load = settings.load or [*names, *(entry.name for entry in registered if entry.preload)] or BUNDLED
    adapters = option_adapters(settings.adapter, names[0] if names else "")
    return ModelSelection(file, registered, dict(named), adapters, list(dict.fromkeys(load)))


def language_models(settings: Settings, selection: ModelSelection) -> list[LanguageModel]:
    """Those that are loaded at start; their checkpoints are not checked."""
    sources = {entry.name: entry.source for entry in selection.registered} | dict(selection.named)
    return [
        LanguageModel(name, f"{name}-{GENERATE}", (sources[name],))
        if name in sources
        else find_language_model(name, settings.model_repository)
        for name in selection.load
    ]


def download_models(selection: ModelSelection) -> ModelSelection:
    """The same with the command's models on this machine, so that their processes need no network."""
    return replace(selection, named={name: downloaded(source) for name, source in selection.named.items()})


def write_models(settings: Settings, selection: ModelSelection) -> list[Path]:
    """Write the model repositories and declare the adapters; returns the repositories of this server's Triton.

    Only once its ports are free: the server that holds them has declared its adapters under their number.
    """
    # Included even when it is empty, so that Triton sees models that are added later.
    repositories = [*settings.model_repository, sync_registry(selection.registry)]
    if named := [entry_of(source, name) for name, source in selection.named.items()]:
        code = paths.model_repository()
        repositories.append(sync_repository(_repository_name(named, code), named, code))
    declare_adapters(
        settings.adapters,
        {
            registry_name(selection.registry): registry_adapters(selection.registered, selection.registry),
            serve_name(settings.http_port): selection.adapters,
        },
    )
    return repositories


def _registered(file: Path | None) -> tuple[Path, list[Entry]]:
    if file is not None and not file.is_file():
        raise ServingError(f"the registry {file} does not exist; name another with --registry, or tritonlm add one")
    path = (file or paths.registry()).resolve()
    return path, read_registry(path) if path.is_file() else []


def _named(option: str) -> tuple[str, Source]:
    """Name and source of MODEL or NAME=MODEL."""
    name, model = split_name(option)
    source = parse(model)
    return entry_of(source, name).name, source


def _repository_name(entries: Sequence[Entry], code: Path) -> str:
    """All that is written: the same option, such as `.`, means another model in another working folder."""
    return "\n".join([str(code.resolve()), *(entry.model_dump_json() for entry in entries)])


def _refuse_duplicates(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1 or name in BUNDLED:
            raise ServingError(f"two language models are named {name}; name one as NAME=MODEL")
