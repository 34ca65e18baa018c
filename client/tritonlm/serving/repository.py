"""What a language model is on disk: an ensemble in a model repository, its parts, and the checkpoint they read.

It reads `config.pbtxt` as text, with the few patterns that matter here, and knows nothing of a running Triton. All that
it writes is the bytecode of a model's Python.
"""

from __future__ import annotations

import compileall
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlm.contract import Checkpoint
from tritonlm.contract.checkpoint import HUB
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
    checkpoints: tuple[Checkpoint, ...]


def find_language_model(name: str, repositories: Sequence[Path]) -> LanguageModel:
    """The LM of this name, or ServingError when it is not there or is no LM."""
    config = _config(name, repositories)
    parts = list(dict.fromkeys(_STEP.findall(config)))
    if not parts:
        raise ServingError(f"{name} is not a language model: its config.pbtxt has no ensemble steps")
    engines, checkpoints = [], {}
    for part in parts:
        part_config = _config(part, repositories)
        if _CONTROL_INPUT.search(part_config):
            engines.append(part)
        found = _CHECKPOINT.search(part_config)
        # What is on the Hub is fetched, and then checked, by the model itself.
        if found and not found[1].startswith(HUB):
            # The parameter is relative to the model's own folder, which may itself be a link.
            folder = _folder(part, repositories) / found[1]
            checkpoints[folder.resolve()] = Checkpoint(folder.resolve())
    if len(engines) != 1:
        raise ServingError(
            f"{name} is not a language model: one of its parts ({', '.join(parts)}) must have the input "
            f"{CONTROL.name!r}, and {len(engines)} have it"
        )
    if not checkpoints and not any(_CHECKPOINT.search(_config(part, repositories)) for part in parts):
        raise ServingError(f"none of {name}'s parts ({', '.join(parts)}) names a checkpoint in its config.pbtxt")
    return LanguageModel(name, engines[0], tuple(checkpoints.values()))


def compile_code(repositories: Sequence[Path]) -> None:
    """Compile the models' Python, as their processes else do while they load.

    They write what they compiled beside it, whatever the environment says, and by that the model's folder is another:
    the next time Triton is told to load the model it would start all of its processes anew. Where nothing can be
    written, they cannot either.
    """
    for code in {path.parent.resolve() for folder in repositories for path in folder.glob("*/1/model.py")}:
        compileall.compile_dir(code, quiet=2)


def _folder(model: str, repositories: Sequence[Path]) -> Path:
    for repository in repositories:
        if not repository.is_dir():
            raise ServingError(f"model repository {repository} does not exist; give another with --model-repository")
        if (repository / model / "config.pbtxt").is_file():
            return repository / model
    places = ", ".join(str(repository) for repository in repositories)
    raise ServingError(f"there is no {model}/config.pbtxt in {places}; name a model with --load")


def _config(model: str, repositories: Sequence[Path]) -> str:
    if not re.fullmatch(r"[\w.-]+", model) or model in (".", ".."):
        raise ServingError(f"{model!r} is not a model's name")
    path = _folder(model, repositories) / "config.pbtxt"
    return _COMMENT.sub("", path.read_text(encoding="utf-8"))
