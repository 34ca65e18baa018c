"""Writes registry entries as Triton models: for each NAME an ensemble NAME and its three parts NAME-….

Each part is a config.pbtxt. Its code is linked from the bundled model repository, or copied when the folder must be
self-contained (an object store, another machine). It writes files and does not contact Triton.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tritonlm.checkpoints.reference import HubModel
from tritonlm.contract import tool_formats
from tritonlm.contract.file_edits import locked
from tritonlm.contract.parts import PARTS

from . import paths
from .errors import ServingError
from .registry import Entry, read_registry

# The ensemble whose config.pbtxt is the template of the others.
_TEMPLATE = "abacus"
_CHECKPOINT = re.compile(r'(key:\s*"checkpoint"\s*value:\s*\{\s*string_value:\s*")[^"]*(")')
_STEP = re.compile(rf'(model_name:\s*")({"|".join(PARTS)})(")')


def sync_repository(name: str, entries: Sequence[Entry], code: Path) -> Path:
    """Create or update the cached model repository of this name to hold exactly these entries; return its folder."""
    folder = _cached_repository(name)
    folder.mkdir(parents=True, exist_ok=True)
    expected = {model for entry in entries for model in model_names(entry)}
    for path in folder.iterdir():
        if path.name not in expected:
            _remove(path)
    for entry in entries:
        write_entry(entry, folder, code)
    return folder


def sync_registry(file: Path) -> Path:
    """The same with the entries of a registry; none if there is no such file."""
    file = file.resolve()
    # Of two processes that have added entries the second one reads those of both.
    with locked(_cached_repository(str(file))):
        entries = read_registry(file) if file.is_file() else []
        return sync_repository(str(file), entries, paths.model_repository())


def _cached_repository(name: str) -> Path:
    return paths.cache() / "repositories" / hashlib.sha256(name.encode()).hexdigest()[:12]


def model_names(entry: Entry) -> list[str]:
    return [entry.name, *(f"{entry.name}-{part}" for part in PARTS)]


def write_entry(entry: Entry, repository: Path, code: Path, copy: bool = False) -> None:
    """Write an entry's four models, each atomically. The checkpoint is not checked here."""
    for model, part in zip(model_names(entry), (_TEMPLATE, *PARTS), strict=True):
        config = _config(entry, code / part / "config.pbtxt", part)
        content = _folder(entry) if part == _TEMPLATE else code / part / "1"
        _write_model(repository / model, config, content, copy)


def _folder(entry: Entry) -> Path | None:
    """The folder that becomes version 1 of the ensemble. GGUF files and models of the Hub have none."""
    return None if entry.path is None or entry.path.is_file() else entry.path


def remove_entry(name: str, repository: Path) -> None:
    for model in (name, *(f"{name}-{part}" for part in PARTS)):
        _remove(repository / model)


def _config(entry: Entry, file: Path, part: str) -> str:
    if not file.is_file():
        raise ServingError(f"{file} does not exist; name the folder with the bundled models with --model-repository")
    text = file.read_text(encoding="utf-8")
    if part == _TEMPLATE:
        return _STEP.sub(rf"\g<1>{entry.name}-\g<2>\g<3>", text)
    reference = _reference(entry)
    text, count = _CHECKPOINT.subn(lambda match: f"{match[1]}{reference}{match[2]}", text)
    assert count == 1, f"{file} names one checkpoint"
    if part == "detokenize":
        return text
    parameters = entry.engine_parameters() if part == "generate" else {}
    # Both `tokenize` and `generate` read these.
    shared = {
        "max_context_tokens": entry.max_context_tokens,
        "kv_cache_tokens": entry.kv_cache_tokens,
        tool_formats.SETTING: entry.tool_format,
    }
    parameters |= {name: str(value) for name, value in shared.items() if value is not None}
    lines = [
        f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}\n' for name, value in parameters.items()
    ]
    return text + "".join(lines)


def _reference(entry: Entry) -> str:
    """The parameter `checkpoint`, which `checkpoints.resolve` reads."""
    source = entry.source
    if isinstance(source, HubModel):
        return source.reference
    if not source.is_file():
        return f"../{entry.name}/1"
    if re.search(r'["\\\n]', str(source)):
        raise ServingError(f"the name of {source} has a quotation mark, a backslash or a line break; rename it")
    return str(source)


def _write_model(folder: Path, config: str, content: Path | None, copy: bool) -> None:
    """`content` becomes the model's version 1; without it version 1 is an empty folder."""
    if _is_written(folder, config, content, copy):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside the repository: Triton takes every folder inside it for a model.
    staging = Path(tempfile.mkdtemp(dir=folder.parent.parent, prefix=".making-"))
    try:
        staging.chmod(0o755)
        (staging / "config.pbtxt").write_text(config, encoding="utf-8")
        if content is None:
            (staging / "1").mkdir()
        elif copy:
            shutil.copytree(content, staging / "1", ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (staging / "1").symlink_to(content.resolve())
        _remove(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_written(folder: Path, config: str, content: Path | None, copy: bool) -> bool:
    version, file = folder / "1", folder / "config.pbtxt"
    if copy or not version.exists() or not file.is_file() or file.read_text(encoding="utf-8") != config:
        return False
    return version.resolve() == content.resolve() if content is not None else not version.is_symlink()


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
