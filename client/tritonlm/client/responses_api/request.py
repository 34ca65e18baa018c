"""A Responses request as the arguments of a chat, with what has no effect named in warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import InvalidRequest
from tritonlm.contract.tool_formats import EFFORT

from .items import as_items, read_conversation
from .schemas import LOGPROBS, SAMPLING
from .tools import read_tools

_PRIORITIES = {"flex": 3, "priority": 1, "fast": 1}
# The chat's names of fields that have another name here; the first that fits counts.
NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    EFFORT: "reasoning.effort",
}
_NO_SUPPORT = ("conversation", "prompt", "moderation", "context_management")


@dataclass
class ChatCall:
    arguments: dict[str, Any]
    # The request's own items, without those of earlier responses.
    items: list[dict[str, Any]]
    custom_tools: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)


def chat_call(sent: Mapping[str, Any], history: Sequence[dict[str, Any]] = ()) -> ChatCall:
    """`sent`: the fields of the body. `history`: the items of the responses that this one continues."""
    for name in _NO_SUPPORT:
        if name in sent:
            raise InvalidRequest(f"{name} is not supported; leave it out", name)
    items = as_items(sent["input"])
    conversation = read_conversation(sent.get("instructions"), [*history, *items], len(history))
    tools = read_tools(sent.get("tools") or (), sent.get("tool_choice"))
    arguments: dict[str, Any] = {
        "model": sent["model"],
        "messages": conversation.messages,
        **{name: sent[name] for name in SAMPLING if name in sent},
        **{name: sent[name] for name in ("stream", "user", "chat_template_kwargs") if name in sent},
        **tools.arguments(sent.get("parallel_tool_calls")),
        **_text_format(sent.get("text") or {}),
        **_logprobs(sent),
    }
    if (effort := (sent.get("reasoning") or {}).get("effort")) is not None:
        arguments[EFFORT] = effort
    if "max_output_tokens" in sent:
        arguments["max_tokens"] = sent["max_output_tokens"]
    if (tier := sent.get("service_tier")) in _PRIORITIES:
        arguments.setdefault("priority", _PRIORITIES[tier])
    warnings = [*conversation.warnings, *tools.warnings, *_ineffective(sent)]
    return ChatCall(arguments, items, tools.custom, warnings)


def check_stream_options(sent: Mapping[str, Any]) -> None:
    if "stream_options" in sent and not sent.get("stream"):
        raise InvalidRequest("stream_options needs stream: true", "stream_options")


def _text_format(text: Mapping[str, Any]) -> dict[str, Any]:
    """`text.format` as the chat's `response_format`, which has the schema one level deeper."""
    value = text.get("format")
    value = {name: part for name, part in (value or {}).items() if part is not None}
    if value in ({}, {"type": "text"}):
        return {}
    kind = value.get("type")
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if kind != "json_schema":
        raise InvalidRequest("text.format.type must be text, json_object or json_schema", "text.format.type")
    if not isinstance(value.get("schema"), Mapping):
        raise InvalidRequest("text.format.schema must be a JSON schema", "text.format.schema")
    inner = {name: part for name, part in value.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def _logprobs(sent: Mapping[str, Any]) -> dict[str, Any]:
    if LOGPROBS in sent.get("include", ()):
        return {"logprobs": True, "top_logprobs": sent.get("top_logprobs", 0)}
    if sent.get("top_logprobs"):
        raise InvalidRequest(f"top_logprobs needs {LOGPROBS} in include", "top_logprobs")
    return {}


def _ineffective(sent: Mapping[str, Any]) -> list[str]:
    reasoning, text = sent.get("reasoning") or {}, sent.get("text") or {}
    warnings = []
    if text.get("verbosity") not in (None, "medium"):
        warnings.append("text.verbosity has no effect")
    if reasoning.get("effort") is not None:
        warnings.append("reasoning.effort has an effect only if the chat template has a variable for it")
    if reasoning.get("summary") or reasoning.get("generate_summary"):
        warnings.append("reasoning.summary has no effect: reasoning is returned in full")
    return warnings
