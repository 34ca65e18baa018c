"""Generates JSON schemas like those that applications send: records of many fields, from a seed.

The same seed gives the same schemas. Each is written by this file alone, so they have the project's licence. Some use a
keyword that structured outputs do not support, which must be refused by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NOUNS = _words(
    "order invoice customer address product review ticket event booking flight recipe song article author repository "
    "commit issue job node cluster metric alert patient visit account payment shipment device sensor reading route "
    "stop lesson student grade survey answer message thread contact note task project release licence policy claim"
)
_FIELDS = _words(
    "id name title label code status kind owner city country street zip phone email url language currency amount price "
    "total tax count quantity weight height score rank rating level priority size duration latitude longitude created "
    "updated due start end color unit version branch path host port user group role tag comment summary reason source"
)
_WORDS = _words("open closed pending active low medium high red green blue small large daily weekly admin guest draft")
_FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4", "hostname")
_PATTERNS = ("^[A-Z]{3}-[0-9]{4}$", "^[a-z][a-z0-9_]{0,9}$", "^#[0-9a-f]{6}$", "^(yes|no)$", "^\\d{3}-\\d{2}$")
# Each is refused: the keyword that the message must name.
UNSUPPORTED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "uniqueItems": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "phone-number": {"type": "string", "format": "phone-number"},
}
_UNSUPPORTED_SHARE = 0.06


def generate(count: int, seed: int = 0) -> Iterator[tuple[Schema, str]]:
    """So many schemas, each with the keyword for which it must be refused; empty: it must be accepted."""
    for number in range(count):
        yield _Generator(random.Random(f"{seed}-{number}")).schema()


class _Generator:
    def __init__(self, source: random.Random) -> None:
        self._random = source

    def schema(self) -> tuple[Schema, str]:
        root = self._object(depth=0)
        root["title"] = self._random.choice(_NOUNS)
        if self._random.random() < 0.3:
            root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        if self._random.random() < 0.25:
            self._add_definition(root)
        refused = ""
        if self._random.random() < _UNSUPPORTED_SHARE:
            refused = self._random.choice(list(UNSUPPORTED))
            root["properties"]["unsupported"] = UNSUPPORTED[refused]
        return root, refused

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(_FIELDS, self._random.randint(1, 6 if depth == 0 else 3))
        properties = {name: self._field(depth + 1) for name in names}
        schema: Schema = {"type": "object", "properties": properties}
        required = [name for name in names if self._random.random() < 0.75]
        if required:
            schema["required"] = required
        # Open objects may hold anything: most applications close them.
        if self._random.random() < 0.9:
            schema["additionalProperties"] = False
        elif self._random.random() < 0.5:
            schema["additionalProperties"] = {"type": "integer"}
        if self._random.random() < 0.3:
            schema["description"] = f"a {self._random.choice(_NOUNS)}"
        return schema

    def _field(self, depth: int) -> Schema:
        kinds: list[Callable[[int], Schema]] = [
            self._text, self._text, self._number, self._number, self._choice, self._choice, self._flag, self._nullable,
        ]  # fmt: skip
        if depth < 3:
            kinds += [
                self._array,
                self._array,
                self._object,
                self._alternatives,
                self._variants,
                self._tuple,
                self._map,
            ]
        return self._random.choice(kinds)(depth)

    def _text(self, depth: int) -> Schema:
        schema: Schema = {"type": "string"}
        form = self._random.randrange(4)
        if form == 0:
            schema["format"] = self._random.choice(_FORMATS)
        elif form == 1:
            schema["pattern"] = self._random.choice(_PATTERNS)
        elif form == 2:
            schema |= {"minLength": self._random.randint(0, 3), "maxLength": self._random.randint(4, 24)}
        else:
            schema["maxLength"] = 16
        return schema

    def _number(self, depth: int) -> Schema:
        low = self._random.randint(-20, 100)
        form = self._random.randrange(5)
        if form == 0:
            return {"type": "integer"}
        if form == 1:
            return {"type": "integer", "minimum": low, "maximum": low + self._random.randint(0, 5000)}
        if form == 2:
            return {"type": "number", "exclusiveMinimum": low, "maximum": low + 2.5}
        if form == 3:
            return {"type": "integer", "multipleOf": self._random.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
        return {"type": "number", "minimum": 0}

    def _choice(self, depth: int) -> Schema:
        if self._random.random() < 0.2:
            return {"const": self._random.choice([*_WORDS, 7, True, None])}
        values: list[Any] = self._random.sample(_WORDS, self._random.randint(2, 5))
        if self._random.random() < 0.2:
            return {"enum": [*values, None, 3]}
        return {"type": "string", "enum": values}

    def _flag(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def _nullable(self, depth: int) -> Schema:
        return {"type": [self._random.choice(("integer", "boolean")), "null"]}

    def _array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        return {
            "type": "array", "items": self._field(depth + 1), "minItems": least,
            "maxItems": least + self._random.randint(0, 3),
        }  # fmt: skip

    def _tuple(self, depth: int) -> Schema:
        items = [self._number(depth), self._choice(depth)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _alternatives(self, depth: int) -> Schema:
        return {"anyOf": [self._text(depth), self._number(depth), {"type": "null"}]}

    def _variants(self, depth: int) -> Schema:
        """A union whose variants differ in one constant, as typed languages write it."""
        variants = []
        for name in self._random.sample(_NOUNS, 2):
            variant = self._object(depth + 1)
            variant["properties"] = {"type": {"const": name}, **variant["properties"]}
            variant |= {"required": ["type", *variant.get("required", [])], "additionalProperties": False}
            variants.append(variant)
        return {self._random.choice(("anyOf", "oneOf")): variants}

    def _map(self, depth: int) -> Schema:
        values = self._random.choice((self._number, self._choice))(depth)
        if self._random.random() < 0.5:
            return {"type": "object", "additionalProperties": values, "maxProperties": 3}
        return {"type": "object", "patternProperties": {"^[a-z]{1,6}$": values}, "additionalProperties": False}

    def _add_definition(self, root: Schema) -> None:
        """A referenced definition; sometimes a tree, which refers to itself."""
        root["$defs"] = {"entry": self._object(depth=2)}
        if self._random.random() < 0.4:
            children = {"type": "array", "items": {"$ref": "#/$defs/entry"}, "maxItems": 2}
            root["$defs"]["entry"]["properties"]["children"] = children
        root["properties"]["entry"] = {"$ref": "#/$defs/entry"}
