"""The constraint of a request's text: one parameter, `structured_outputs`, and the other names for it.

It is an object with exactly one of the kinds below. vLLM's older names (`guided_json` …) and OpenAI's `response_format`
mean the same, and `merge_names` turns them into it, so that nothing else knows them. Each value may also be written as
a JSON string, because Triton's flat request parameters hold no objects. This module checks forms and sizes. Whether a
grammar is correct is checked where it is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest

NAME, RESPONSE_FORMAT = "structured_outputs", "response_format"
JSON, JSON_OBJECT, REGEX, CHOICE, GRAMMAR = KINDS = ("json", "json_object", "regex", "choice", "grammar")
# The most characters of a schema, a regular expression, a grammar or all choices together.
MAX_CHARACTERS = 1 << 18
# The deepest nesting of a schema's objects and lists.
MAX_DEPTH = 96
MAX_CHOICES = 4096

_GUIDED = {"guided_json": JSON, "guided_regex": REGEX, "guided_choice": CHOICE, "guided_grammar": GRAMMAR}
_FORMATS = ("text", "json_object", "json_schema")
_FORMAT_FIELDS = {"json_schema": ("type", "json_schema")}
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")

Schema = dict[str, Any]
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS}
# A schema is an object or a boolean; every value may be written as a JSON string.
_JSON_SCHEMAS: dict[str, Schema] = {
    JSON: {"anyOf": [{"type": "object"}, {"type": "boolean"}, _TEXT]},
    JSON_OBJECT: {"const": True},
    REGEX: _TEXT,
    CHOICE: {
        "anyOf": [{"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_CHOICES}, _TEXT],
        "description": f"all choices together have at most {MAX_CHARACTERS} characters",
    },
    GRAMMAR: _TEXT,
}


def _read_json(name: str, value: Any) -> dict[str, Any] | bool:
    """A JSON schema, or a boolean, which allows every value or none."""
    schema = _parsed(name, value)
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequest.for_value(name, "a JSON schema: an object or a boolean", value)
    if is_deeper(schema, MAX_DEPTH):
        raise InvalidRequest(f"{name} must not be nested more than {MAX_DEPTH} levels deep", name)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name} must be a JSON schema: {error}", name) from None
    _check_size(name, len(text))
    return schema


def _read_flag(name: str, value: Any) -> bool:
    if value is not True:
        raise InvalidRequest.for_value(name, "true; leave it out otherwise", value)
    return True


def _read_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest.for_value(name, "a string that is not empty", value)
    _check_size(name, len(value))
    check_unicode(name, value)
    return value


def _read_choice(name: str, value: Any) -> list[str]:
    choices = _parsed(name, value)
    valid = isinstance(choices, (list, tuple)) and 1 <= len(choices) <= MAX_CHOICES
    if not valid or not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidRequest.for_value(name, f"a list of 1 to {MAX_CHOICES} strings that are not empty", value)
    _check_size(name, sum(map(len, choices)))
    for choice in choices:
        check_unicode(name, choice)
    return list(choices)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    JSON: _read_json, JSON_OBJECT: _read_flag, REGEX: _read_text, CHOICE: _read_choice, GRAMMAR: _read_text
}  # fmt: skip


def _object_of(kind: str) -> Schema:
    """The schema of an object of this kind. As with every optional field, null means "not sent"."""
    others = {other: {"type": "null"} for other in KINDS if other != kind}
    return {
        "type": "object", "properties": {kind: _JSON_SCHEMAS[kind], **others}, "required": [kind],
        "additionalProperties": False,
    }  # fmt: skip


@dataclass(frozen=True)
class StructuredOutputs:
    """Reads the parameter: an object of exactly one kind."""

    @property
    def schema(self) -> Schema:
        return {"anyOf": [*map(_object_of, KINDS), _TEXT]}

    def __call__(self, name: str, value: Any) -> dict[str, Any]:
        sent = _parsed(name, value)
        expected = f"an object with exactly one of {', '.join(KINDS)}"
        if not isinstance(sent, Mapping):
            raise InvalidRequest.for_value(name, expected, value)
        sent = {key: kind for key, kind in sent.items() if kind is not None}
        if unknown := [key for key in sent if key not in KINDS]:
            raise InvalidRequest(f"{name}.{str(unknown[0])[:64]} is not known; {name} must be {expected}", name)
        if len(sent) != 1:
            raise InvalidRequest(f"{name} must be {expected} (got {' and '.join(sent) or 'none'})", name)
        [(kind, content)] = sent.items()
        return {kind: _READERS[kind](f"{name}.{kind}", content)}


@dataclass(frozen=True)
class OtherName:
    """Another name of the parameter: how its value is read into the same object."""

    read: Callable[[Any], dict[str, Any]]
    schema: Schema
    meaning: str
    allowed: str


def _read_guided(name: str, kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {kind: _READERS[kind](name, value)}


def _read_format(value: Any) -> dict[str, Any]:
    """OpenAI's `response_format`. The text always follows the schema exactly, so `strict` changes nothing."""
    sent = _parsed(RESPONSE_FORMAT, value)
    kind = sent.get("type") if isinstance(sent, Mapping) else None
    if kind not in _FORMATS:
        raise InvalidRequest.for_value(RESPONSE_FORMAT, f"an object whose type is one of {', '.join(_FORMATS)}", value)
    _refuse_others(RESPONSE_FORMAT, sent, _FORMAT_FIELDS.get(kind, ("type",)))
    if kind == "text":
        return {}
    if kind == "json_object":
        return {JSON_OBJECT: True}
    name = f"{RESPONSE_FORMAT}.json_schema"
    described = sent.get("json_schema")
    if not isinstance(described, Mapping) or described.get("schema") is None:
        raise InvalidRequest(f'{name} must be an object such as {{"name": "answer", "schema": {{…}}}}', name)
    _refuse_others(name, described, _SCHEMA_FIELDS)
    for key, kind_of_value, expected in (
        ("name", str, "a string"), ("description", str, "a string"), ("strict", bool, "true or false")
    ):  # fmt: skip
        if described.get(key) is not None and not isinstance(described[key], kind_of_value):
            raise InvalidRequest.for_value(f"{name}.{key}", expected, described[key])
    return {JSON: _read_json(f"{name}.schema", described["schema"])}


_FORMAT_SCHEMA: Schema = {
    "anyOf": [
        {
            "type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": ["string", "null"]}, "description": {"type": ["string", "null"]},
                        "schema": _JSON_SCHEMAS[JSON], "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["schema"], "additionalProperties": False,
                },
            },
            "required": ["type", "json_schema"], "additionalProperties": False,
        },
        _TEXT,
    ]
}  # fmt: skip

OTHER_NAMES: dict[str, OtherName] = {
    RESPONSE_FORMAT: OtherName(
        _read_format, _FORMAT_SCHEMA, "OpenAI's form of structured_outputs: text, json_object or json_schema",
        "{type: …}",
    ),
    **{
        name: OtherName(
            _read_guided(name, kind), _JSON_SCHEMAS[kind], f"vLLM's older name of structured_outputs with {kind}",
            f"as {kind}",
        )
        for name, kind in _GUIDED.items()
    },
}  # fmt: skip


def merge_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with every other name of `structured_outputs` turned into it; two of them are refused."""
    sent = [name for name in (NAME, *OTHER_NAMES) if values.get(name) is not None]
    if len(sent) > 1:
        raise InvalidRequest(f"{sent[0]} and {sent[1]} both constrain the text; send one of them", sent[1])
    merged = {name: value for name, value in values.items() if name not in OTHER_NAMES}
    if sent and sent[0] != NAME:
        merged[NAME] = OTHER_NAMES[sent[0]].read(values[sent[0]]) or None
    return merged


def with_sent_name(error: InvalidRequest, sent: Mapping[str, Any]) -> InvalidRequest:
    """A server's error about the constraint, with the name under which the caller has sent it."""
    name = next((name for name in OTHER_NAMES if sent.get(name) is not None), None)
    if name is None or error.param is None or not error.param.startswith(NAME):
        return error
    shown_name = f"{name}.json_schema.schema" if name == RESPONSE_FORMAT else name
    return type(error)(error.message.replace(error.param, shown_name, 1), shown_name)


def _parsed(name: str, value: Any) -> Any:
    """The value of a JSON string; any other value as it is."""
    if not isinstance(value, str):
        return value
    _check_size(name, len(value))
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is a string that is not valid JSON: {error}", name) from None


def _refuse_others(name: str, sent: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [key for key in sent if key not in known]:
        raise InvalidRequest(f"{name}.{str(unknown[0])[:64]} is not known; {name} has only {', '.join(known)}", name)


def _check_size(name: str, characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise InvalidRequest(f"{name} must have at most {MAX_CHARACTERS} characters (got {characters})", name)


def check_unicode(name: str, text: str) -> None:
    """Refuse what JSON can hold and UTF-8 cannot: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} holds an unpaired surrogate, which is not a valid character", name) from None


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested more deeply than that; without recursion, which Python limits."""
    layer = [value]
    for _ in range(levels + 1):
        inner: list[Any] = []
        for item in layer:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, (list, tuple)):
                inner += item
        if not inner:
            return False
        layer = inner
    return True
