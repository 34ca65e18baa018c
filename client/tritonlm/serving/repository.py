"""Finds a language model on disk: an ensemble in a model repository, its parts, and their checkpoint.

It reads `config.pbtxt` as text with a few patterns and does not contact Triton. It writes only compiled Python.
"""

from __future__ import annotations

import compileall
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlm.checkpoints.reference import Source, source_of
from tritonlm.contract import CheckpointError
from tritonlm.contract.tensors import CONTROL

from .errors import ServingError

_COMMENT = re.compile(r"#.*")
_STEP = re.compile(r'model_name:\s*"([^"]+)"')
_CHECKPOINT = re.compile(r'key:\s*"checkpoint"\s*,?\s*value:?\s*\{\s*string_value:\s*"([^"]*)"')
_CONTROL_INPUT = re.compile(rf'name:\s*"{CONTROL.name}"')


@dataclass(frozen=True)
class LanguageModel:
    name: str
    generate: str  # the part that holds the engine
    # What its parts name as their checkpoint, usually the same. It need not exist.
    sources: tuple[Source, ...]
    # Known when its checkpoint has been checked.
    has_chats: bool = False


def find_language_model(name: str, repositories: Sequence[Path]) -> LanguageModel:
    """The LM of this name; ServingError when it does not exist or is not an LM."""
    config = _config(name, repositories)
    parts = list(dict.fromkeys(_STEP.findall(config)))
    if not parts:
        raise ServingError(f"{name} is not a language model: its config.pbtxt has no ensemble steps")
    engines, sources = [], []
    for part in parts:
        part_config = _config(part, repositories)
        if _CONTROL_INPUT.search(part_config):
            engines.append(part)
        parameter = _CHECKPOINT.search(part_config)
        if parameter:
            sources.append(_source(part, parameter[1], repositories))
    if len(engines) != 1:
        raise ServingError(
            f"{name} is not a language model: one of its parts ({', '.join(parts)}) must have the input "
            f"{CONTROL.name!r}, and {len(engines)} have it"
        )
    if not sources:
        raise ServingError(f"none of {name}'s parts ({', '.join(parts)}) names a checkpoint in its config.pbtxt")
    return LanguageModel(name, engines[0], tuple(dict.fromkeys(sources)))


def _source(part: str, reference: str, repositories: Sequence[Path]) -> Source:
    """A path is relative to the model's folder, which may be a link."""
    try:
        return source_of(reference, _folder(part, repositories))
    except CheckpointError as error:
        raise ServingError(f"{part}: {error}") from None


def compile_code(repositories: Sequence[Path]) -> None:
    """Compile the models' Python before Triton loads them.

    Otherwise the models' processes write bytecode into the model folder while they load, even with
    PYTHONDONTWRITEBYTECODE. Triton then sees a changed folder and restarts the processes at the next load request.
    A read-only folder needs no compilation: the processes cannot write there either.
    """
    for code in {path.parent.resolve() for folder in repositories for path in folder.glob("*/1/model.py")}:
        compileall.compile_dir(code, quiet=2)


def _folder(model: str, repositories: Sequence[Path]) -> Path:
    for repository in repositories:
        if not repository.is_dir():
            raise ServingError(f"model repository {repository} does not exist; name another with --model-repository")
        if (repository / model / "config.pbtxt").is_file():
            return repository / model
    folders = ", ".join(str(repository) for repository in repositories)
    raise ServingError(f"there is no {model}/config.pbtxt in {folders}; name a model with --load")


def _config(model: str, repositories: Sequence[Path]) -> str:
    if not re.fullmatch(r"[\w.-]+", model) or model in (".", ".."):
        raise ServingError(f"{model!r} is not a valid model name")
    path = _folder(model, repositories) / "config.pbtxt"
    return _COMMENT.sub("", path.read_text(encoding="utf-8"))
