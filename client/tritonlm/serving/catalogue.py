"""Which language models a server has: the bundled ones, the registry's, and checkpoints named at the start.

It settles from which folders Triton reads and what is loaded at once. It starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import paths
from .entries import repository_of
from .errors import ServingError
from .registry import Entry, make_entry, read_registry
from .settings import Settings

BUNDLED = ("abacus", "fable")


@dataclass(frozen=True)
class Catalogue:
    repositories: list[Path]
    # What is loaded at the start; the others at their first request.
    load: list[str]
    # The one that answers where none is named; empty: any.
    default: str


def catalogue(settings: Settings) -> Catalogue:
    code = paths.model_repository()
    repositories = list(settings.model_repository)
    file, registered = _registered(settings.registry)
    # Though it may be empty: what is added later is found at once.
    repositories.append(repository_of(str(file), registered, code))
    named = [_named(text) for text in settings.checkpoint]
    _refuse_twins([*registered, *named])
    if named:
        repositories.append(repository_of("\0".join(settings.checkpoint), named, code))
    chosen = settings.load or [
        *(entry.name for entry in named),
        *(entry.name for entry in registered if entry.preload),
    ]
    return Catalogue(repositories, list(dict.fromkeys(chosen or BUNDLED)), named[0].name if named else "")


def _registered(file: Path | None) -> tuple[Path, list[Entry]]:
    if file is not None and not file.is_file():
        raise ServingError(f"the registry {file} does not exist; name another with --registry, or tritonlm add one")
    found = (file or paths.registry()).resolve()
    return found, read_registry(found) if found.is_file() else []


def _named(text: str) -> Entry:
    """FOLDER or NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = "", text
    path = Path(folder).expanduser().resolve()
    return make_entry(name=name or path.name, path=path)


def _refuse_twins(entries: Sequence[Entry]) -> None:
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1 or name in BUNDLED:
            raise ServingError(f"two language models are named {name}; name a checkpoint by --checkpoint NAME=FOLDER")
