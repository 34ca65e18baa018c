"""The fields of requests as pydantic types: what the bodies of the gateway and the calls of other APIs share.

The fields of the sampling parameters are generated from the contract, which validates their values. It knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from tritonlm.client.sequences import RESERVED_PARAMETERS
from tritonlm.contract import InvalidRequest, SamplingParameters
from tritonlm.contract.structured_outputs import OTHER_NAMES, check_unicode

NULL = {"type": "null"}
_MAX_NAME = 64
# The field `model` names the adapter.
_ADAPTER = "adapter"


def _to_integer(value: object) -> object:
    """Accept 5.0 as an integer: JSON does, and some languages write all numbers like that."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_to_integer)]
ShortText = Annotated[str | None, Field(max_length=256)]
# A name beside which a server keeps facts, such as the history of its requests, has a bounded length.
MAX_MODEL_NAME = 512
Model = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)]
# The client refuses any value.
Refused = Annotated[Any, WithJsonSchema(NULL)]


class Body(BaseModel):
    """A body of a million wrong parts must make few errors: pydantic collects all, and only the first one is sent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names_and_texts(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        for text in _texts_of(list(sent)):
            check_unicode("body", text)
        for name, value in sent.items():
            for text in _texts_of(value):
                check_unicode(str(name)[:_MAX_NAME], text)
        unknown = next((name for name in sent if name not in cls.model_fields), None)
        return {name: value for name, value in sent.items() if name in cls.model_fields or name == unknown}

    def arguments(self) -> dict[str, Any]:
        """The fields that were sent. `null` means "not sent"."""
        sent = self.model_dump(include=self.model_fields_set)
        return {name: value for name, value in sent.items() if value is not None}


def _texts_of(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, names of fields included; without recursion, which Python limits."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            parts += (*part, *part.values())
        elif isinstance(part, list):
            parts += part


B = TypeVar("B", bound=Body)


def sampling_fields(*without: str) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    for spec in fields(SamplingParameters):
        if spec.name not in (*RESERVED_PARAMETERS, _ADAPTER, *without):
            meaning = f"{spec.metadata['meaning']} ({spec.metadata['allowed']})"
            # The schema is for documentation only; the contract validates the value.
            schema: dict[str, Any] = {"anyOf": [spec.metadata["reader"].schema, NULL]}
            definitions[spec.name] = (Any, Field(None, description=meaning, json_schema_extra=schema))
    for name, other in OTHER_NAMES.items():
        if name not in without:
            schema = {"anyOf": [other.schema, NULL]}
            definitions[name] = (Any, Field(None, description=other.meaning, json_schema_extra=schema))
    return definitions


def read_body(kind: type[B], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were sent, checked; the first mistake is an error that names its field."""
    body = _plain(values)
    try:
        return kind.model_validate(body).arguments()
    except RecursionError:
        raise InvalidRequest("a field is nested too deeply") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise mistake(problem["type"], problem["loc"], problem["msg"], body) from None


def _plain(value: Any) -> Any:
    """The client's own results as JSON objects, and any sequence as a list: both may be parts of a request."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def mistake(kind: str, location: Sequence[Any], message: str, body: Any) -> InvalidRequest:
    """The error for one of pydantic's findings. `location`: its path in the body, with names of union members."""
    param = _place(kind, location, body)
    if not param:
        return InvalidRequest("the body must be a JSON object")
    if kind == "extra_forbidden":
        return InvalidRequest(f"unknown parameter {param!r}", param)
    if kind == "missing":
        return InvalidRequest(f"{param} is required", param)
    return InvalidRequest(f"{param}: {message}", param)


def _place(kind: str, location: Sequence[Any], body: Any) -> str:
    """The location as in tools[0].type: without what the body does not hold, which are names of union members."""
    place, value = "", body
    for depth, part in enumerate(location):
        is_missing = kind == "missing" and depth == len(location) - 1
        if isinstance(value, list) and isinstance(part, int):
            place, value = f"{place}[{part}]", value[part]
        elif not depth or (isinstance(value, dict) and (part in value or is_missing)):
            name = str(part)[:_MAX_NAME]
            place, value = f"{place}.{name}" if place else name, value.get(part) if isinstance(value, dict) else None
    return place
