"""The adapters file of a language model: a JSON object of adapter names, each with the folder of its files.

The command line, the gateway and training jobs write it; the engine follows it while it runs. Writers hold a lock and
replace the file as a whole, so that a reader sees the old content or the new one. This module knows names and paths,
not what is in an adapter's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import AdapterNotFound, CheckpointError, InvalidRequest, shown
from .file_edits import locked, replace_text

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME = re.compile(NAME)
SUFFIX = ".json"
# `declared_by` of an adapter that is there for a moment, to be tried: no list shows it.
TRIAL = "trial"


@dataclass(frozen=True)
class AdapterEntry:
    """`path`: its folder. `source`: what it was called when it was added, such as an id on the Hub.

    `declared_by`: the registry or the command that lists it, which also removes it; empty: added one by one.
    """

    path: str
    source: str = ""
    declared_by: str = ""

    def __post_init__(self) -> None:
        if not os.path.isabs(self.path):
            raise InvalidRequest(f"path must be an absolute folder (got {shown(self.path)})", "path")


def check_name(name: object, param: str = "adapter") -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, dots, dashes and underscores, of which the first is a letter or a digit"
        raise InvalidRequest.for_value(param, allowed, name)
    return name


def adapters_file(setting: str | Path, model: str) -> Path:
    """The file of an LM. `setting`: the file itself if it ends in .json, else a folder that holds LM.json for each."""
    path = Path(setting)
    return path if path.suffix == SUFFIX else path / f"{model}{SUFFIX}"


def read_adapters(file: Path) -> dict[str, AdapterEntry]:
    """The adapters by name; none if there is no file. CheckpointError says what is wrong in a broken one."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the adapters file {file} cannot be read: {error}") from None
    if not isinstance(rows, dict):
        raise CheckpointError(f'the adapters file {file} must be an object such as {{"NAME": {{"path": "/folder"}}}}')
    return {name: _entry(file, name, row) for name, row in rows.items()}


def _entry(file: Path, name: str, row: object) -> AdapterEntry:
    try:
        check_name(name, "a name")
        if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
            raise InvalidRequest.for_value(name, 'an object such as {"path": "/folder"}', row)
        return AdapterEntry(**row)
    except InvalidRequest as error:
        raise CheckpointError(f"the adapters file {file}: {name!r:.80}: {error.message}") from None
    except TypeError:
        raise CheckpointError(
            f"the adapters file {file}: {name!r:.80} needs a path, and may have source and declared_by only"
        ) from None


def add_adapter(file: Path, name: str, entry: AdapterEntry, *, replace: bool = False) -> None:
    """Add an adapter. With `replace`, one of the same name is replaced, and requests that run keep the old one."""
    check_name(name)
    with edit_adapters(file) as adapters:
        if name in adapters and not replace:
            raise InvalidRequest(f"there is an adapter {name!r} already; remove it first", "adapter")
        adapters[name] = entry


def remove_adapter(file: Path, name: str) -> AdapterEntry:
    """Remove an adapter from the file and return its entry. Its folder stays, and requests that run end with it."""
    with edit_adapters(file) as adapters:
        if name not in adapters:
            raise AdapterNotFound.of(name, file.stem, adapters)
        return adapters.pop(name)


@contextlib.contextmanager
def edit_adapters(file: Path) -> Iterator[dict[str, AdapterEntry]]:
    """The adapters, to be edited in place; written back as a whole unless an error is raised."""
    with locked(file):
        before = read_adapters(file)
        adapters = dict(before)
        yield adapters
        if adapters != before:
            replace_text(file, _text(adapters))


def _text(adapters: dict[str, AdapterEntry]) -> str:
    rows = {name: {field: value for field, value in asdict(entry).items() if value} for name, entry in adapters.items()}
    return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
