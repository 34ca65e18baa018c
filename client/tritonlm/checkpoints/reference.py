"""MODEL, as callers name a model: a folder, a GGUF file, or a model of the Hugging Face Hub.

    runs/step_2920, ~/models/smollm2                     a folder in Hugging Face format
    models/smollm2-q4.gguf                               a GGUF file; of a split one, any part
    org/name, org/name@revision                          a model of the Hub
    org/name:file.gguf, org/name@revision:Q4_K_M         a GGUF file of the Hub, by name or by quantization

An existing path comes first, as everywhere. hf:// before a Hub id excludes paths. Nothing is downloaded or opened here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from tritonlm.contract.checkpoint import HUB
from tritonlm.contract.errors import CheckpointError

_GGUF = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
# A file may lie in a folder of its repository. A revision may hold slashes: refs/pr/3.
_HUB_MODEL = re.compile(rf"(?P<repo>{_WORD}(?:/{_WORD})?)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[\w][\w .+()/-]*))?")
# What no name of a served model has anywhere, and at its start and its end.
_FORBIDDEN = re.compile(r"[^A-Za-z0-9._-]+")
_FORBIDDEN_ENDS = re.compile(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+$")
_MAX_NAME = 100
# NAME=MODEL, unless a path is called so.
_NAMED = re.compile(rf"(?P<name>{_WORD})=(?P<model>.+)")


@dataclass(frozen=True)
class HubModel:
    """`file` is a GGUF file of the repository, or its quantization, such as Q4_K_M; empty: its safetensors, if any."""

    repo: str
    revision: str = ""
    file: str = ""
    # The path that the caller may have meant, and that does not exist; empty after hf://.
    missing_path: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")

    @property
    def reference(self) -> str:
        return f"{HUB}{self}"


# What MODEL names. A path need not be a checkpoint.
Source = Path | HubModel


def split_name(text: str) -> tuple[str, str]:
    """NAME and MODEL of `NAME=MODEL`; an empty name where there is none, and for an existing path."""
    match = None if _exists(expanded(text)) else _NAMED.fullmatch(text)
    return (match["name"], match["model"]) if match else ("", text)


def parse(text: str, base: Path | None = None) -> Source:
    """The source that MODEL names; CheckpointError if it names none."""
    source = source_of(text, base)
    if isinstance(source, Path) and not source.exists():
        hint = "" if "/" in text or text.endswith(_GGUF) else "; a model of the Hugging Face Hub is named ORG/NAME"
        raise CheckpointError(f"there is no folder or GGUF file {source if base else text}{hint}")
    return source


def source_of(text: str, base: Path | None = None) -> Source:
    """The same for a reference that may name a path that does not exist; a relative path is relative to `base`."""
    if text.startswith(HUB):
        return _parse_hub(text.removeprefix(HUB))
    path = (base or Path.cwd()) / expanded(text)
    match = None if _exists(path) else _HUB_MODEL.fullmatch(text)
    # One word alone is rather a mistyped folder than one of the Hub's oldest models; these take hf://.
    if match and "/" in match["repo"] and not match["repo"].endswith(_GGUF):
        return replace(_hub_model(match), missing_path=str(path) if base else text)
    return absolute(path)


def expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        # ~NAME without such a user, or ~ where HOME is not set and the user has no entry: a shell leaves it, too.
        return Path(path)


def _exists(path: Path) -> bool:
    """Also of a text that can be no path: one that is too long, or holds a zero byte."""
    try:
        if "\0" not in str(path):
            return path.exists()
    except OSError:
        pass
    raise CheckpointError(f"{str(path)[:100]!r} is not a valid path")


def absolute(path: Path) -> Path:
    """Without links, but for that of a file itself: in the Hub's cache a file is a link to a blob that has no name."""
    path = expanded(path)
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def _parse_hub(text: str) -> HubModel:
    match = _HUB_MODEL.fullmatch(text)
    if match is None:
        raise CheckpointError(
            f"{text} is not a model of the Hugging Face Hub: ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE"
        )
    return _hub_model(match)


def _hub_model(match: re.Match[str]) -> HubModel:
    return HubModel(match["repo"], match["revision"] or "", match["file"] or "")


def default_name(source: Source) -> str:
    """The name under which a model is served that is given none: that of its folder, file or repository.

    A name is a part of URLs and of folders, so all but letters, digits, dots, dashes and underscores becomes a dash.
    Empty if nothing is left.
    """
    return _FORBIDDEN.sub("-", _FORBIDDEN_ENDS.sub("", _own_name(source)))[:_MAX_NAME]


def _own_name(source: Source) -> str:
    if isinstance(source, Path):
        return stem(source.name)
    name = source.repo.rpartition("/")[2]
    if not source.file:
        return name
    if source.file.lower().endswith(_GGUF):
        return stem(source.file.rpartition("/")[2])
    return f"{re.sub(r'[-_.]gguf$', '', name, flags=re.IGNORECASE)}-{source.file}"


def stem(name: str) -> str:
    """A GGUF file's name without its ending and its number of a split file; other names are complete."""
    return _PART.sub("", name[: -len(_GGUF)]) if name.lower().endswith(_GGUF) else name
