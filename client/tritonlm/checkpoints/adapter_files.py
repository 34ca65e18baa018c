"""Where an adapter comes from: a folder in PEFT's format, or a repository of the Hugging Face Hub.

Checked here is what can be told from names and adapter_config.json. Whether the weights fit a language model, its
engine decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tritonlm.contract.errors import CheckpointError

from .hub import Progress, fetch
from .reference import HubModel, parse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


def adapter_folder(
    text: str, base: Path | None = None, progress: Progress = lambda _done, _total: None
) -> tuple[Path, str]:
    """The folder of the adapter that a path or ORG/NAME names, and the name if it is the Hub's.

    A relative path is relative to `base`, by default to the working folder. The Hub's files are downloaded.
    """
    source = parse(text, base)
    if isinstance(source, HubModel):
        folder = fetch(source, progress=progress, choose=choose_adapter_files)
    else:
        folder = source
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; name the one that holds {CONFIG}")
        _require_files(str(folder), [file.name for file in folder.iterdir()])
    _check_config(folder / CONFIG)
    return folder, str(source) if isinstance(source, HubModel) else ""


def choose_adapter_files(model: HubModel, names: Iterable[str], weights: bool = True) -> list[str]:
    if model.file:
        raise CheckpointError(f"{model} names a file; an adapter is the whole repository: {model.repo}")
    _require_files(str(model), names)
    return [CONFIG, WEIGHTS] if weights else [CONFIG]


def _require_files(source: str, names: Iterable[str]) -> None:
    present = set(names)
    if CONFIG not in present:
        raise CheckpointError(f"{source} has no {CONFIG}: it is not an adapter in PEFT's format")
    if WEIGHTS not in present:
        pickled = ", only pickled ones, which can run code and are not loaded" if _PICKLED in present else ""
        raise CheckpointError(f"{source} has no {WEIGHTS}{pickled}; save it with PEFT's save_pretrained()")


def _check_config(file: Path) -> None:
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type must be LORA (got {kind!r:.60}); other adapters are not served")
