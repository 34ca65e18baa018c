"""The registry: one YAML or JSON file that lists language models and the settings of each.

It reads, validates and edits the file. `entries` writes the model repository of an entry.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tritonlm.checkpoints.reference import HubModel, Source, absolute, default_name, expanded, source_of
from tritonlm.contract import CheckpointError, devices, tool_formats
from tritonlm.contract.file_edits import locked, replace_text
from tritonlm.contract.parts import PARTS, part_of

from .errors import ServingError
from .settings import Device, KVDtype

if TYPE_CHECKING:
    from ruamel.yaml import YAML

# A model's name is also a folder name and a part of URLs.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_NAME_RULE = "must be 1 to 100 letters, digits, dots, dashes and underscores, of which the first is a letter or a digit"
_HUB_ID = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$"
# The length is bounded by max_length: a bound inside a Unicode pattern costs 20 MB and a slow import.
_REVISION = r"^[\w./-]+$"
_HUB_FILE = r"^\w[\w .+()/-]*$"


class Entry(BaseModel):
    """A language model. Unset fields fall back to the settings of `tritonlm serve`, then to the engine's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME, description="the language model's name in every API")
    path: Path | None = Field(None, description="its folder or GGUF file, relative to the registry file")
    hf_repo: str | None = Field(None, pattern=_HUB_ID, description="or its id on the Hugging Face Hub")
    revision: str | None = Field(
        None, pattern=_REVISION, max_length=200, description="branch, tag or commit of hf_repo"
    )
    hf_file: str | None = Field(
        None,
        pattern=_HUB_FILE,
        max_length=300,
        description="a GGUF file of hf_repo, or its quantization: Q4_K_M",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(None, description="number type")
    kv_dtype: KVDtype | None = Field(None, description="number type of its KV cache")
    device: Device | None = Field(None, description=f"where it computes: {devices.ALLOWED}, with an engine on each")
    max_context_tokens: int | None = Field(None, ge=1, description="its longest context; never above the checkpoint's")
    max_sequences: int | None = Field(None, ge=1, le=4096, description="slots: sequences that run together")
    kv_cache_tokens: int | None = Field(None, ge=1, description="tokens that its KV cache holds")
    max_queue_size: int | None = Field(None, ge=0, description="requests that may wait for a slot")
    queue_seconds: Annotated[float, Field(ge=0)] | None = Field(None, description="how long a request may wait")
    idle_unload_seconds: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the gateway unloads it after this time without a request"
    )
    tool_format: Literal[tool_formats.FORMATS] | None = Field(  # type: ignore[valid-type]
        None, description="how it writes tool calls; default: recognized from its chat template"
    )
    adapters: dict[str, str] | None = Field(
        None, description="its LoRA adapters: names, each with a folder relative to the registry file, or ORG/NAME"
    )
    preload: bool = Field(False, description="whether it is loaded at the start, and not at its first request")

    @model_validator(mode="after")
    def _has_one_source(self) -> Entry:
        if (self.path is None) == (self.hf_repo is None):
            raise ValueError("exactly one of path and hf_repo is needed")
        if self.revision is not None and self.hf_repo is None:
            raise ValueError("revision is for hf_repo; a path has none")
        if self.hf_file is not None and self.hf_repo is None:
            raise ValueError("hf_file is for hf_repo; a GGUF file is named by path")
        if part_of(self.name):
            raise ValueError(f"a name must not end in {', '.join(PARTS)}: the parts of a language model are named so")
        return self

    @property
    def source(self) -> Source:
        if self.path is not None:
            return self.path
        assert self.hf_repo is not None
        return HubModel(self.hf_repo, self.revision or "", self.hf_file or "")

    def at(self, path: Path) -> Entry:
        """The same for a source that is on this machine now."""
        return self.model_copy(update={"path": path, "hf_repo": None, "revision": None, "hf_file": None})

    def engine_parameters(self) -> dict[str, str]:
        """The parameters for its models' config.pbtxt."""
        names = (
            "dtype", "kv_dtype", "device", "max_context_tokens", "max_sequences", "kv_cache_tokens", "max_queue_size",
            "queue_seconds", "idle_unload_seconds", "tool_format",
        )  # fmt: skip
        return {name: f"{value}" for name in names if (value := getattr(self, name)) is not None}


def make_entry(**values: Any) -> Entry:
    try:
        return Entry(**values)
    except ValidationError as error:
        raise ServingError(_first_problem(error)) from None


def entry_of(source: Source, name: str = "", **values: Any) -> Entry:
    """The entry of a source; without a name it is called like its folder, file or repository."""
    if not (name := name or default_name(source)):
        raise ServingError(f"{source} has a name without letters and digits of ASCII; name it as NAME=MODEL")
    return make_entry(name=name, **source_fields(source), **values)


def source_fields(source: Source) -> dict[str, Any]:
    """The fields of an entry that name this source."""
    if isinstance(source, Path):
        return {"path": source}
    fields = {"hf_repo": source.repo, "revision": source.revision or None, "hf_file": source.file or None}
    return {name: value for name, value in fields.items() if value is not None}


def read_registry(file: Path) -> list[Entry]:
    """The entries with absolute paths; ServingError names the invalid entry and field."""
    rows = _rows(_load(file), file)
    entries: list[Entry] = []
    for number, row in enumerate(rows):
        try:
            entry = Entry.model_validate(_with_source(row, file.parent) if isinstance(row, dict) else row)
        except ValidationError as error:
            name = row.get("name", f"entry {number + 1}") if isinstance(row, dict) else f"entry {number + 1}"
            raise ServingError(f"{file}: {name}: {_first_problem(error)}") from None
        except CheckpointError as error:
            raise ServingError(f"{file}: {row.get('name')}: {error}") from None
        if any(entry.name == other.name for other in entries):
            raise ServingError(f"{file}: two entries are named {entry.name}; rename one")
        if entry.path is not None:
            entry = entry.model_copy(update={"path": absolute(file.parent / expanded(entry.path))})
        entries.append(entry)
    return entries


def _with_source(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row, with the field `model`, which takes any MODEL, as the fields that it stands for."""
    fields = dict(row)
    if not {"path", "hf_repo"} & fields.keys() and isinstance(fields.get("model"), str):
        fields |= source_fields(source_of(fields.pop("model"), folder))
    return fields


def add_entry(file: Path, entry: Entry) -> None:
    """Append an entry; the rest of the file, comments included, is kept."""
    with _editing(file) as rows:
        if any(row["name"] == entry.name for row in rows):
            raise ServingError(
                f"{entry.name} is in {file} already; choose another name, or run tritonlm remove {entry.name} first"
            )
        rows.append(entry.model_dump(mode="json", exclude_defaults=True))


def remove_entry(file: Path, name: str) -> None:
    with _editing(file) as rows:
        indexes = [index for index, row in enumerate(rows) if row["name"] == name]
        if not indexes:
            known = ", ".join(str(row["name"]) for row in rows) or "none"
            raise ServingError(f"{name} is not in {file}; registered are: {known}")
        del rows[indexes[0]]


@contextmanager
def _editing(file: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows, to be edited in place; written back as a whole unless an error is raised."""
    with locked(file):
        if file.exists():
            read_registry(file)
        content = _load(file) if file.exists() else []
        yield _rows(content, file)
        replace_text(file, _text(content, file))


def _text(content: Any, file: Path) -> str:
    if file.suffix == ".json":
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    output = io.StringIO()
    _yaml().dump(content, output)
    return output.getvalue()


def _load(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"the registry {file} cannot be read: {error}") from None
    try:
        return json.loads(text) if file.suffix == ".json" else _load_yaml(text) or []
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ServingError(f"the registry {file} is not valid {file.suffix[1:].upper() or 'YAML'}: {reason}") from None


def _rows(content: Any, file: Path) -> list[dict[str, Any]]:
    """The rows of a list of entries, or of an object with such a list under `models`."""
    rows = content.get("models") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ServingError(f"the registry {file} must be a list of entries, each with a name and a path or hf_repo")
    return rows


def _load_yaml(text: str) -> Any:
    """Raises ValueError if it is not valid YAML."""
    from ruamel.yaml.error import YAMLError  # noqa: PLC0415 (as in `_yaml`)

    try:
        return _yaml().load(text)
    except YAMLError as error:
        raise ValueError(str(error)) from None


def _yaml() -> YAML:
    from ruamel.yaml import YAML  # noqa: PLC0415 (slow to import, and many servers have no registry)

    # The round-trip mode, which keeps comments and order.
    return YAML()


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    is_name = (field, problem["type"]) == ("name", "string_pattern_mismatch")
    message = _NAME_RULE if is_name else problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message} (got {problem['input']!r:.60})" if field else message
