"""The JSON schemas of what is nested in a request: messages and their blocks, the choice of a tool, thinking.

They document and check nothing: `blocks` and `request` do, whose errors name the place. As with every optional field,
null means "not sent".
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from tritonlm.client.request_fields import NULL

_TEXT, _OBJECT = {"type": "string"}, {"type": "object"}
_OPTIONAL_TEXT = {"anyOf": [_TEXT, NULL]}
_OPTIONAL_FLAG = {"anyOf": [{"type": "boolean"}, NULL]}
# Fields that a block may have besides are named in warnings.


def _typed(kind: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **required, **(optional or {})},
        "required": ["type", *required],
    }


_TEXT_BLOCK = _typed("text", {"text": _TEXT})
_DOCUMENT = _typed(
    "document", {"source": _typed("text", {"data": _TEXT})}, {"title": _OPTIONAL_TEXT, "context": _OPTIONAL_TEXT}
)
# Left out and named in warnings.
_HOSTED = {
    "type": "object",
    "properties": {"type": {"type": "string", "pattern": "^(server_tool_use|[a-z_]+_tool_result)$"}},
    "required": ["type"],
}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT_BLOCK, _DOCUMENT]}}]}
_BLOCKS: dict[str, list[dict[str, Any]]] = {
    "user": [
        _typed(
            "tool_result", {"tool_use_id": _TEXT},
            {"content": {"anyOf": [*_TEXTS["anyOf"], NULL]}, "is_error": _OPTIONAL_FLAG},
        )
    ],
    "assistant": [
        _typed("tool_use", {"id": _TEXT, "name": _TEXT, "input": _OBJECT}),
        _typed("thinking", {"thinking": _TEXT}),
        _typed("redacted_thinking", {}),
    ],
    "system": [],
}  # fmt: skip


def _message(role: str) -> dict[str, Any]:
    blocks = {"type": "array", "items": {"anyOf": [_TEXT_BLOCK, _DOCUMENT, *_BLOCKS[role], _HOSTED]}}
    return {
        "type": "object",
        "properties": {"role": {"const": role}, "content": {"anyOf": [_TEXT, blocks]}},
        "required": ["role", "content"],
        "additionalProperties": NULL,
    }


_PARALLEL = {"disable_parallel_tool_use": _OPTIONAL_FLAG}
_TOOL_CHOICE = {
    "anyOf": [
        *(_typed(kind, {}, _PARALLEL) for kind in ("auto", "any", "none")),
        _typed("tool", {"name": {"type": "string", "minLength": 1, "maxLength": 128}}, _PARALLEL),
    ]
}
THINKING = ("enabled", "adaptive", "between_tools", "disabled")

Message = Annotated[dict[str, Any], WithJsonSchema({"anyOf": [_message(role) for role in _BLOCKS]})]
System = Annotated[str | Annotated[list[dict[str, Any]], Field(fail_fast=True)], WithJsonSchema(_TEXTS)]
ToolChoice = Annotated[dict[str, Any], WithJsonSchema(_TOOL_CHOICE)]
Thinking = Annotated[dict[str, Any], WithJsonSchema({"anyOf": [_typed(kind, {}) for kind in THINKING]})]
