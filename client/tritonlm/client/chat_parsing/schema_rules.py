"""A function's parameters as rules of a grammar: as JSON, Python's keyword arguments, or Qwen's XML.

JSON is left to llguidance. The other forms are written out property by property; what they cannot hold is refused by
name when the arguments must be valid, and left to the model otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tritonlm.client.chat_parsing.tools import Function
from tritonlm.contract import InvalidRequest
from tritonlm.contract.json_schemas import with_exact_values

Rules = dict[str, str]
# As templates write JSON, so that a model's own text and the grammar agree.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords of a schema that allow properties beside `properties`.
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if")
_DEFINITIONS = ("$defs", "definitions")
NOTES = ("title", "description", "default", "examples", "example", "deprecated", "$schema", "$id", "$comment")


def json_arguments(schema: Mapping[str, Any], strict: bool) -> str:
    """Arguments as JSON. Only declared parameters are written, unless the schema itself allows others."""
    root = {"type": "object", **schema}
    if not any(keyword in root for keyword in _OPEN):
        root["additionalProperties"] = False
    return json_value(root, strict)


def json_content(schema: Mapping[str, Any]) -> str:
    """An answer that follows a schema."""
    return json_value(schema, strict=True)


def json_value(schema: Mapping[str, Any], strict: bool) -> str:
    return "%json " + json.dumps({**with_exact_values(schema), "x-guidance": {**_SPACING, "lenient": not strict}})


def _with_definitions(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema with the definitions that it may refer to."""
    value = schema if isinstance(schema, Mapping) else {}
    return {**value, **{name: root[name] for name in _DEFINITIONS if name in root}}


def properties_of(function: Function, strict: bool) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it is required, for a schema that is a plain list of properties."""
    schema = function.parameters
    known = ("type", "properties", "required", "additionalProperties", *_DEFINITIONS, *NOTES)
    for keyword in schema:
        if strict and keyword not in known:
            raise InvalidRequest(
                f"{function.path}.parameters.{keyword} cannot be enforced in this model's format of tool calls",
                f"{function.path}.parameters",
            )
    properties = schema.get("properties")
    required = schema.get("required")
    names = required if isinstance(required, (list, tuple)) else ()
    found = properties if isinstance(properties, Mapping) else {}
    return [(name, value, name in names) for name, value in found.items()]


def keywords(
    name: str, properties: list[tuple[str, Any, bool]], argument: Callable[[int, str, Any], str], separator: str,
    rules: Rules,
) -> str:  # fmt: skip
    """Arguments in the order of the schema, where optional ones may be missing."""
    count = len(properties)
    for index in reversed(range(count)):
        key, schema, required = properties[index]
        rules[f"{name}_{index}"] = argument(index, key, schema)
        # `first`: no argument has been written yet; `later`: one has, so that a separator comes before the next.
        for kind, before in (("first", ""), ("later", f"{json.dumps(separator)} " if separator else "")):
            rest = f"{name}_later_{index + 1}" if index + 1 < count else ""
            skipped = f"{name}_{kind}_{index + 1}" if index + 1 < count else '""'
            rules[f"{name}_{kind}_{index}"] = f"{before}{name}_{index} {rest}" + ("" if required else f" | {skipped}")
    return f"{name}_first_0" if count else ""


def python_arguments(name: str, function: Function, strict: bool, rules: Rules) -> str:
    def argument(_: int, key: str, schema: Any) -> str:
        if not key.isidentifier():
            raise unwritable(function, key)
        return f"{json.dumps(key + '=')} {json_value(_with_definitions(schema, function.parameters), strict)}"

    return keywords(name, properties_of(function, strict), argument, ", ", rules)


def xml_arguments(name: str, function: Function, strict: bool, rules: Rules) -> str:
    def argument(index: int, key: str, schema: Any) -> str:
        if not key.replace("_", "").replace("-", "").isalnum():
            raise unwritable(function, key)
        begin, end = f"<parameter={key}>\n", "\n</parameter>\n"
        if _is_text(schema):
            rules[f"{name}_{index}_text[lazy]"] = f"TEXT {json.dumps(end)}"
            free = f"{name}_{index}_text"
            return f"{json.dumps(begin)} {text_value(function, key, schema, strict, free, json.dumps(end))}"
        value = json_value(_with_definitions(schema, function.parameters), strict)
        return f"{json.dumps(begin)} {value} {json.dumps(end)}"

    return keywords(name, properties_of(function, strict), argument, "", rules)


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def is_text_choice(schema: Mapping[str, Any]) -> bool:
    choices = schema.get("enum", [schema.get("const")])
    return isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)


def text_value(function: Function, key: str, schema: Mapping[str, Any], strict: bool, free: str, end: str) -> str:
    """A string without quotation marks, up to its end: one of an enumeration, or free."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, (list, tuple)) and all(isinstance(choice, str) for choice in choices):
        return "(" + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices) + f") {end}"
    for keyword in schema:
        if strict and keyword not in ("type", *NOTES):
            raise InvalidRequest(
                f"{function.path}.parameters: {keyword} of {key} cannot be enforced in this model's format of tool "
                "calls",
                f"{function.path}.parameters",
            )
    return free


def unwritable(function: Function, key: str) -> InvalidRequest:
    return InvalidRequest(
        f"{function.path}.parameters: {key!r} cannot be written in this model's format of tool calls; rename it",
        f"{function.path}.parameters",
    )
