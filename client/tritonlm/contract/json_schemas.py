"""Walks through JSON schemas: where a keyword is, and the values that follow a schema once they are read.

It does not know what compiles them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

# Keywords whose keys are names of the caller, and keywords that hold values and no schemas.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("enum", "const", "default", "examples")
# The dates that exist: llguidance's expression allows the year 0, and February 29 in each year. The beginning of a date
# without February 29, and February 29 of leap years.
_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_REAL_DATE = f"^({_YEAR}-(0[13-9]|1[0-2]|02-[01]|02-2[0-8])|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"

# A bound in this range has a decimal notation of few digits. The smallest number beyond 0 that is written.
_LARGEST, _SMALLEST = 1e15, 1e-15


def keywords(schema: Any) -> Iterator[tuple[str, str, Any]]:
    """Each keyword of a schema with its JSON pointer and its value, the outer ones first."""
    for path, item in _schemas(schema):
        for key, value in item.items():
            yield f"{path}/{key}", key, value


def place_of(schema: Any, key: str, value: str | None = None) -> str | None:
    """The JSON pointer of the first such keyword in a schema, or of the first with this value."""
    return next((place for place, name, found in keywords(schema) if name == key and value in (None, found)), None)


def with_exact_values(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema restricted to values that follow it once they are read: dates that exist, and numbers that are beyond
    an exclusive bound as doubles, too, as 70.00000000000000001 is not beyond 70."""
    exact = copy.deepcopy(dict(schema))
    for _, item in list(_schemas(exact)):
        if item.get("format") in ("date", "date-time"):
            others = item.get("allOf", [])
            if isinstance(others, list):
                item["allOf"] = [*others, {"pattern": _REAL_DATE}]
        _exclude_rounded(item)
    return exact


def _exclude_rounded(schema: dict[str, Any]) -> None:
    """Replace exclusive bounds of numbers by the nearest double beyond: what is rounded to a bound is not beyond it."""
    kinds = schema.get("type", "number")
    if "number" not in (kinds if isinstance(kinds, list) else [kinds]):
        return
    for exclusive, inclusive, direction in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
        bound = schema.get(exclusive)
        if not isinstance(bound, (int, float)) or isinstance(bound, bool) or abs(bound) > _LARGEST:
            continue
        nearest = math.nextafter(bound, direction * math.inf) if bound else direction * _SMALLEST
        other = schema.get(inclusive)
        known = [other] if isinstance(other, (int, float)) and not isinstance(other, bool) else []
        schema[inclusive] = (max if direction > 0 else min)(nearest, *known) if known else nearest
        del schema[exclusive]


def _schemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all schemas in it, each with its JSON pointer."""
    pending: list[tuple[str, Any, bool]] = [("", schema, True)]
    while pending:
        path, item, is_schema = pending.pop(0)
        if isinstance(item, Mapping):
            if is_schema:
                yield path, item  # type: ignore[misc]
            pending += [
                (f"{path}/{key}", value, not is_schema or key not in _NAMED)
                for key, value in item.items()
                if not is_schema or key not in _VALUES
            ]
        elif isinstance(item, list):
            pending += [(f"{path}/{index}", inner, True) for index, inner in enumerate(item)]
