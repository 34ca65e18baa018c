"""A function's parameters as rules of a grammar in Gemma's form: {key:value,…}, with strings between marks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tritonlm.client.chat_parsing.schema_rules import (
    NOTES,
    Rules,
    is_text_choice,
    json_value,
    keywords,
    properties_of,
    text_value,
    unwritable,
)
from tritonlm.client.chat_parsing.tools import Function
from tritonlm.contract import InvalidRequest

_MAX_DEPTH = 16


def gemma_arguments(name: str, function: Function, strict: bool, mark: str, rules: Rules) -> str:
    """`mark` stands on both sides of a string."""
    return _Gemma(name, function, strict, mark, rules).object(name, function.parameters, 0)


class _Gemma:
    def __init__(self, name: str, function: Function, strict: bool, mark: str, rules: Rules) -> None:
        self._function, self._strict, self._mark, self._rules = function, strict, mark, rules
        self._string = f"{name}_string"
        # A delimiter that is a token cannot be part of the text; one that is text ends it.
        if mark.startswith("<["):
            rules[self._string] = f"{mark} TEXT {mark}"
        else:
            rules[f"{self._string}_rest[lazy]"] = f"TEXT {mark}"
            rules[self._string] = f"{mark} {self._string}_rest"

    def object(self, name: str, schema: Mapping[str, Any], depth: int) -> str:
        part = Function(self._function.name, dict(schema), self._strict, {}, self._function.path)

        def argument(index: int, key: str, value: Any) -> str:
            if not key.replace("_", "").replace("-", "").isalnum():
                raise unwritable(self._function, key)
            return f"{json.dumps(key + ':')} {self._value(f'{name}_{index}_value', key, value, depth + 1)}"

        return f'"{{" {keywords(name, properties_of(part, self._strict), argument, ",", self._rules)} "}}"'

    def _value(self, name: str, key: str, schema: Any, depth: int) -> str:
        value = schema if isinstance(schema, Mapping) else {}
        if depth > _MAX_DEPTH:
            raise unwritable(self._function, key)
        kind = value.get("type")
        choices = [{**value, "type": single} for single in kind] if isinstance(kind, list) else value.get("anyOf")
        if isinstance(choices, list):
            return self._any(name, key, choices, depth)
        if kind == "array" and "items" in value:
            self._check(key, value, ("type", "items"))
            self._rules[name] = self._value(f"{name}_item", key, value["items"], depth + 1)
            return f'"[" ({name} ("," {name})*)? "]"'
        if kind == "object" and isinstance(value.get("properties"), Mapping):
            return self.object(name, value, depth)
        return self._single(key, value)

    def _single(self, key: str, schema: Mapping[str, Any]) -> str:
        kind = schema.get("type")
        if kind == "string" or (kind is None and is_text_choice(schema)):
            choices = text_value(self._function, key, schema, self._strict, "", self._mark)
            return f"{self._mark} {choices}" if choices else self._string
        if kind in ("integer", "number", "boolean", "null"):
            return json_value(schema, self._strict)
        if self._strict:
            raise unwritable(self._function, key)
        return self._anything()

    def _any(self, name: str, key: str, schemas: list[Any], depth: int) -> str:
        values = [self._value(f"{name}_{index}", key, schema, depth + 1) for index, schema in enumerate(schemas)]
        return "(" + " | ".join(values) + ")"

    def _check(self, key: str, schema: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for keyword in schema:
            if self._strict and keyword not in (*known, *NOTES):
                raise InvalidRequest(
                    f"{self._function.path}.parameters: {keyword} of {key} cannot be enforced in this model's format "
                    "of tool calls",
                    f"{self._function.path}.parameters",
                )

    def _anything(self) -> str:
        name = f"{self._string}_anything"
        if name not in self._rules:
            self._rules[name] = ""
            plain = json_value({"type": ["number", "boolean", "null"]}, strict=True)
            self._rules["KEY"] = "/[A-Za-z_][A-Za-z0-9_]*/"
            pair = f'KEY ":" {name}'
            self._rules[name] = (
                f'{self._string} | {plain} | "[" ({name} ("," {name})*)? "]" | "{{" ({pair} ("," {pair})*)? "}}"'
            )
        return name
