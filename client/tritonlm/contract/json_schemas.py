"""Walks through JSON schemas: where a keyword is, and the values that follow a schema once they are read.

It does not know what compiles them.
"""

from __future__ import annotations

import copy
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

# Decimals beside an exclusive bound, and digits of a number there: doubles tell all such numbers apart.
_DECIMALS, _DIGITS, _LARGEST = 9, 14, 1e14


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
    an exclusive bound as doubles, too, as 70.0000000000000000167 is not beyond 70."""
    exact = copy.deepcopy(dict(schema))
    for _, item in list(_schemas(exact)):
        if item.get("format") in ("date", "date-time"):
            others = item.get("allOf", [])
            if isinstance(others, list):
                item["allOf"] = [*others, {"pattern": _REAL_DATE}]
        _limit_decimals(item)
    return exact


def _limit_decimals(schema: dict[str, Any]) -> None:
    """Beside an exclusive bound, numbers have few decimals: with more, they could be rounded to the bound.

    An inclusive bound a little beyond would not do: the compiler rounds it, and excludes numbers of fewer decimals.
    """
    kinds = schema.get("type", "number")
    if "number" not in (kinds if isinstance(kinds, list) else [kinds]) or "multipleOf" in schema:
        return
    bounds = [schema.get(name) for name in ("exclusiveMinimum", "exclusiveMaximum")]
    sizes = [abs(bound) for bound in bounds if isinstance(bound, (int, float)) and not isinstance(bound, bool)]
    if sizes and max(sizes) < _LARGEST:
        schema["multipleOf"] = 10.0 ** -min(_DECIMALS, _DIGITS - len(str(int(max(sizes)))))


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
