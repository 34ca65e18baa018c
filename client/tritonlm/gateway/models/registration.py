"""Registers a model that a caller names by folder, GGUF file or Hub id, so that this server's Triton can load it.

It downloads and checks the model first, as `tritonlm add` and `tritonlm pull` do together. It loads nothing, and does
not know which models Triton has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tritonlm.checkpoints.reference import HubModel, Source, parse, source_of
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.contract import Checkpoint, CheckpointError, InvalidRequest, ModelNotFound
from tritonlm.serving import ServingError, paths
from tritonlm.serving.entries import sync_registry
from tritonlm.serving.registry import Entry, add_entry, entry_of, read_registry

_PARAM = "model_path"


def known_name(model: str, registry: Path | None) -> str:
    """The name under which MODEL is loaded if this server knows it: that of its entry in the registry, or its own end.

    InvalidRequest if another model is registered under this name.
    """
    source = _exact_source(model)
    if source is None:
        return model.rstrip("/").rpartition("/")[2]
    try:
        known = _entries(registry or paths.registry())
        if any(entry.name == model for entry in known):
            return model
        registered = next((entry for entry in known if entry.source == source), None)
        return (registered or _new_entry(source, known)).name
    except ServingError as error:
        raise InvalidRequest(str(error), _PARAM) from None


def _exact_source(model: str) -> Source | None:
    """What MODEL names, if that is an existing path or a file of the Hub. Any other may end in a known model's name."""
    try:
        source = source_of(model)
    except CheckpointError:
        return None
    is_exact = bool(source.file) if isinstance(source, HubModel) else source.exists()
    return source if is_exact else None


def register(model: str, registry: Path | None) -> str:
    """Register MODEL and return its name. It may take as long as a download, so it runs on a thread of its own."""
    file = registry or paths.registry()
    try:
        source = parse(model)
    except CheckpointError as error:
        raise ModelNotFound(error.message, _PARAM) from None
    try:
        Checkpoint(folder_of(source)).check()
        known = _entries(file)
        entry = _new_entry(source, known)
        if all(other.name != entry.name for other in known):
            add_entry(file, entry)
        sync_registry(file)
    except (CheckpointError, ServingError) as error:
        raise InvalidRequest(str(error), _PARAM) from None
    return entry.name


def _entries(file: Path) -> list[Entry]:
    return read_registry(file) if file.is_file() else []


def _new_entry(source: Source, known: Sequence[Entry]) -> Entry:
    """The entry that a source gets. Its name may be in the registry for the same source only."""
    entry = entry_of(source)
    if any(other.name == entry.name and other.source != source for other in known):
        raise InvalidRequest(f"another model is registered as {entry.name}; remove it first", _PARAM)
    return entry
