"""Registers a model that a caller names by folder, GGUF file or Hub id, so that this server's Triton can load it.

It downloads and checks the model first, as `tritonlm add` and `tritonlm pull` do together. It loads nothing.
"""

from __future__ import annotations

from pathlib import Path

from tritonlm.checkpoints.reference import default_name, parse
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.contract import Checkpoint, CheckpointError, InvalidRequest, ModelNotFound
from tritonlm.serving import ServingError, paths
from tritonlm.serving.entries import sync_registry
from tritonlm.serving.registry import add_entry, entry_of, read_registry

_PARAM = "model_path"


def register(model: str, registry: Path | None) -> str:
    """Register MODEL and return its name. It may take as long as a download, so it runs on a thread of its own."""
    file = registry or paths.registry()
    try:
        source = parse(model)
    except CheckpointError as error:
        raise ModelNotFound(error.message, _PARAM) from None
    try:
        Checkpoint(folder_of(source)).check()
        entry = entry_of(source)
        known = read_registry(file) if file.is_file() else []
        if all(other.name != entry.name for other in known):
            add_entry(file, entry)
        elif all(other.source != source for other in known if other.name == entry.name):
            raise InvalidRequest(f"another model is registered as {default_name(source)}; remove it first", _PARAM)
        sync_registry(file)
    except (CheckpointError, ServingError) as error:
        raise InvalidRequest(str(error), _PARAM) from None
    return entry.name
