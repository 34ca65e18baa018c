"""An OpenAPI document whose requests have short arrays of objects, to generate requests from.

A chat has messages with parts with undeclared fields: with arrays of any length, a hundred requests are half a megabyte
of mostly random names, and generating those takes most of the time.
"""

from __future__ import annotations

from typing import Any

# Enough for a first, a middle and a last one, equal or different.
LENGTH = 3
# A bound that is about as low stays, and requests above it are generated too; those above a high one take seconds.
_LOW_BOUND = 16
_SCALARS = ("boolean", "integer", "number", "string")
# Responses use the same components, with arrays of any length.
_SUFFIX = "OfShortArrays"


def with_short_arrays(document: dict[str, Any]) -> dict[str, Any]:
    components = document["components"]
    schemas = components["schemas"]
    short = {name + _SUFFIX: _shortened(schema) for name, schema in schemas.items()}
    paths = {
        path: {method: _with_short_body(operation) for method, operation in operations.items()}
        for path, operations in document["paths"].items()
    }
    return {**document, "paths": paths, "components": {**components, "schemas": {**schemas, **short}}}


def _with_short_body(operation: dict[str, Any]) -> dict[str, Any]:
    if "requestBody" not in operation:
        return operation
    return {**operation, "requestBody": _shortened(operation["requestBody"])}


def _shortened(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_shortened(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _shortened(value) for key, value in schema.items()}
    if _is_long(schema):
        result["maxItems"] = max(LENGTH, schema.get("minItems", 0))
    if isinstance(schema.get("$ref"), str):
        result["$ref"] += _SUFFIX
    return result


def _is_long(schema: dict[str, Any]) -> bool:
    items = schema.get("items")
    is_scalar = isinstance(items, dict) and items.get("type") in _SCALARS
    return schema.get("type") == "array" and not is_scalar and schema.get("maxItems", _LOW_BOUND + 1) > _LOW_BOUND
