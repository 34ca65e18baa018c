"""The readers of parameters' values: each checks one value, and knows the JSON schema of what it accepts.

They know neither the parameters' names nor their defaults (`parameters`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LIST = 1024

Schema = dict[str, Any]


class Reader(Protocol):
    """Returns a value in its canonical form, or raises InvalidRequest; `schema` is the equivalent JSON schema."""

    @property
    def schema(self) -> Schema: ...

    def __call__(self, name: str, value: Any) -> Any: ...


@dataclass(frozen=True)
class Integer:
    low: int
    high: int
    expected: str = ""

    @property
    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def __call__(self, name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise InvalidRequest.for_value(name, self.expected or f"an integer from {self.low} to {self.high}", value)
        return value


@dataclass(frozen=True)
class Number:
    low: float
    high: float
    open_low: bool = False

    @property
    def schema(self) -> Schema:
        return {"type": "number", "exclusiveMinimum" if self.open_low else "minimum": self.low, "maximum": self.high}

    def __call__(self, name: str, value: Any) -> float:
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A NaN fails every comparison.
        if not valid or not self.low <= value <= self.high or (self.open_low and value == self.low):
            bound = f"above {self.low:g}" if self.open_low else f"from {self.low:g}"
            raise InvalidRequest.for_value(name, f"a number {bound} to {self.high:g}", value)
        return float(value)


@dataclass(frozen=True)
class Boolean:
    schema: Schema = field(default_factory=lambda: {"type": "boolean"})

    def __call__(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidRequest.for_value(name, "true or false", value)
        return value


@dataclass(frozen=True)
class Text:
    """A short text; empty is that of no value."""

    longest: int
    expected: str
    pattern: str = ""

    @property
    def schema(self) -> Schema:
        return {"type": "string", "maxLength": self.longest, **({"pattern": self.pattern} if self.pattern else {})}

    def __call__(self, name: str, value: Any) -> str:
        valid = isinstance(value, str) and len(value) <= self.longest
        # Not `search`, for which $ stands before a newline at the end, too.
        if not valid or (self.pattern and not re.fullmatch(self.pattern, value)):
            raise InvalidRequest.for_value(name, self.expected, value)
        return str(value)


@dataclass(frozen=True)
class Stops:
    @property
    def schema(self) -> Schema:
        stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
        return {"anyOf": [stop, {"type": "array", "items": stop, "minItems": 1, "maxItems": MAX_STOPS}]}

    def __call__(self, name: str, value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        valid = isinstance(stops, (list, tuple)) and 1 <= len(stops) <= MAX_STOPS
        if not valid or not all(isinstance(s, str) and 1 <= len(s) <= MAX_STOP_CHARACTERS for s in stops):
            expected = f"a string or a list of 1 to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
            raise InvalidRequest.for_value(name, expected, value)
        return tuple(stops)


@dataclass(frozen=True)
class TokenIds:
    limit: int

    @property
    def schema(self) -> Schema:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": self.limit}

    def __call__(self, name: str, value: Any) -> tuple[int, ...]:
        valid = isinstance(value, (list, tuple)) and len(value) <= self.limit
        if not valid or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise InvalidRequest.for_value(name, f"a list of at most {self.limit} token ids", value)
        return tuple(value)


@dataclass(frozen=True)
class Biases:
    bias: Number = Number(-100, 100)

    @property
    def schema(self) -> Schema:
        ids = {"pattern": "^[0-9]{1,10}$"}
        return {
            "type": "object", "propertyNames": ids, "additionalProperties": self.bias.schema, "maxProperties": MAX_LIST
        }  # fmt: skip

    def __call__(self, name: str, value: Any) -> dict[int, float]:
        expected = f"an object of at most {MAX_LIST} token ids, each with a number from -100 to 100"
        if not isinstance(value, Mapping) or len(value) > MAX_LIST:
            raise InvalidRequest.for_value(name, expected, value)
        biases: dict[int, float] = {}
        for key, bias in value.items():
            digits = str(key)
            if not (digits.isascii() and digits.isdecimal() and len(digits) <= 10):
                raise InvalidRequest.for_value(name, expected, value)
            biases[int(digits)] = self.bias(name, bias)
        return biases
