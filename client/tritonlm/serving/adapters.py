"""The adapters that the registry and `tritonlm serve --adapter` declare, in the adapters files that engines follow.

What a declaration no longer has is removed at the next start; adapters that were added one by one stay. This module
writes files and starts nothing, but adapters of the Hub are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlm.checkpoints.adapter_files import adapter_folder
from tritonlm.contract import TritonLMError
from tritonlm.contract.adapters_file import (
    SUFFIX,
    AdapterEntry,
    adapters_file,
    check_name,
    edit_adapters,
    read_adapters,
)

from .downloads import shown_progress
from .errors import ServingError
from .registry import Entry

# A path may hold colons and equals signs, too.
_OPTION = re.compile(r"(?:(?P<lm>[^:=/]+):)?(?P<name>[^:=/]+)=(?P<path>.+)")


@dataclass(frozen=True)
class Declared:
    """An adapter of an LM: its name, and its folder or its id on the Hub. A relative folder is relative to `base`."""

    lm: str
    name: str
    path: str
    base: Path | None = None


def registry_name(file: Path) -> str:
    """Who declares the adapters of a registry: a server on this machine may have another one."""
    return f"registry {file.resolve()}"


def serve_name(http_port: int) -> str:
    """Who declares the adapters of a server's options: another server on this machine may declare others."""
    return f"serve {http_port}"


def option_adapters(options: Sequence[str], default: str) -> list[Declared]:
    """The adapters of NAME=PATH and LM:NAME=PATH. `default`: the first MODEL of the command; empty: there is none."""
    declared = []
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise ServingError(f"--adapter must be NAME=PATH or LM:NAME=PATH (got {option!r})")
        if not (lm := match["lm"] or default):
            raise ServingError(f"--adapter {option} names no language model; write LM:{option}")
        declared.append(Declared(lm, match["name"], match["path"]))
    return declared


def registry_adapters(entries: Sequence[Entry], file: Path) -> list[Declared]:
    return [
        Declared(entry.name, name, path, file.parent)
        for entry in entries
        for name, path in (entry.adapters or {}).items()
    ]


def declare_adapters(folder: Path, declarations: Mapping[str, Sequence[Declared]]) -> None:
    """Make the adapters files hold what each declares: `declarations` has the lists by who declares them."""
    entries: dict[str, dict[str, AdapterEntry]] = {}
    for declared_by, adapters in declarations.items():
        for adapter in adapters:
            of_lm = entries.setdefault(adapter.lm, {})
            if adapter.name in of_lm:
                raise ServingError(f"{adapter.lm} has two adapters {adapter.name}; rename one")
            of_lm[adapter.name] = _entry(adapter, declared_by)
    existing = {file.name.removesuffix(SUFFIX) for file in folder.glob(f"[!.]*{SUFFIX}")}
    for lm in sorted(existing | entries.keys()):
        file, own = adapters_file(folder, lm), entries.get(lm, {})
        before = {name: row for name, row in read_adapters(file).items() if row.declared_by in declarations}
        # Nothing is written without need: the folder may be read-only.
        if own != before:
            _write(file, lm, own, before)


def _entry(adapter: Declared, declared_by: str) -> AdapterEntry:
    try:
        check_name(adapter.name)
        with shown_progress(adapter.path) as progress:
            path, source = adapter_folder(adapter.path, adapter.base, progress)
    except TritonLMError as error:
        raise ServingError(f"the adapter {adapter.name} of {adapter.lm}: {error.message}") from None
    return AdapterEntry(str(path.resolve()), source, declared_by)


def _write(file: Path, lm: str, entries: Mapping[str, AdapterEntry], before: Mapping[str, AdapterEntry]) -> None:
    with edit_adapters(file) as adapters:
        for name in before:
            adapters.pop(name, None)
        if both := sorted(entries.keys() & adapters.keys()):
            owner = adapters[both[0]].declared_by or "tritonlm adapters add"
            raise ServingError(
                f"{lm} has an adapter {both[0]} already, from {owner}; rename one, or run tritonlm adapters remove "
                f"{both[0]} --base {lm}"
            )
        adapters.update(entries)
