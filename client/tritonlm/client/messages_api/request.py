"""A request of the Messages API as the arguments of a chat, with what has no effect named in warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonlm.client.chat_tools import ChatTools, read_function, read_name
from tritonlm.contract import InvalidRequest
from tritonlm.contract.tool_formats import EFFORT

from .blocks import read_conversation
from .documented import THINKING
from .schemas import SAMPLING

# The chat's names of fields that have another name here; the first that fits counts.
NAMES = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    EFFORT: "output_config.effort",
}
# Of `thinking` without an effort: what templates take by themselves.
_THINKING_EFFORT = "medium"
_NO_SUPPORT = ("inference_geo", "container", "diagnostics")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass
class ChatCall:
    arguments: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def chat_call(sent: Mapping[str, Any]) -> ChatCall:
    """`sent`: the fields of the body."""
    for name in _NO_SUPPORT:
        if name in sent:
            raise InvalidRequest(f"{name} is not supported; leave it out", name)
    conversation = read_conversation(sent.get("system"), sent["messages"])
    choice = sent.get("tool_choice") or {}
    tools = _read_tools(sent.get("tools") or (), choice)
    parallel = None if choice.get("disable_parallel_tool_use") is None else not choice["disable_parallel_tool_use"]
    arguments: dict[str, Any] = {
        "model": sent["model"],
        "messages": conversation.messages,
        **{name: sent[name] for name in (*SAMPLING, "stream", "max_tokens", "chat_template_kwargs") if name in sent},
        **tools.arguments(parallel),
        **_format(sent.get("output_config") or {}),
        **_effort(sent),
    }
    if conversation.messages[-1]["role"] == "assistant":
        if "tool_calls" in conversation.messages[-1]:
            raise InvalidRequest(
                "messages must end with the results of its tool_use blocks, or with a text", "messages"
            )
        # The answer goes on where this message ends.
        arguments |= {"continue_final_message": True, "add_generation_prompt": False}
    if sent.get("stop_sequences"):
        arguments["stop"] = sent["stop_sequences"]
    if user := (sent.get("metadata") or {}).get("user_id"):
        arguments["user"] = user
    if sent.get("speed") == "fast":
        arguments.setdefault("priority", 1)
    return ChatCall(arguments, [*conversation.warnings, *tools.warnings, *_ineffective(sent)])


def _read_tools(tools: Sequence[Mapping[str, Any]], choice: Mapping[str, Any]) -> ChatTools:
    result = ChatTools()
    for index, tool in enumerate(tools):
        where, kind = f"tools[{index}]", tool.get("type")
        if kind is None or kind == "custom":
            if tool.get("input_schema") is None:
                raise InvalidRequest(f"{where}.input_schema is required", f"{where}.input_schema")
            result.add(read_function(tool, where, "input_schema"))
        elif isinstance(kind, str):
            result.leave_out(where, kind)
        else:
            raise InvalidRequest(f"{where}.type must be a string", f"{where}.type")
    if choice:
        kind = choice.get("type")
        if kind == "tool":
            result.choose(read_name(choice, "tool_choice"))
        elif isinstance(kind, str) and kind in _CHOICES:
            result.tool_choice = _CHOICES[kind]
        else:
            raise InvalidRequest("tool_choice.type must be auto, any, tool or none", "tool_choice.type")
        if not isinstance(choice.get("disable_parallel_tool_use"), bool | None):
            place = "tool_choice.disable_parallel_tool_use"
            raise InvalidRequest(f"{place} must be true or false", place)
    result.check()
    return result


def _format(config: Mapping[str, Any]) -> dict[str, Any]:
    value = config.get("format")
    if value is None:
        return {}
    if value.get("type") != "json_schema" or not isinstance(value.get("schema"), Mapping):
        place = "output_config.format"
        raise InvalidRequest(f"{place} must be {{type: json_schema, schema: {{…}}}}", place)
    schema = {"name": "output", "schema": value["schema"], "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _effort(sent: Mapping[str, Any]) -> dict[str, Any]:
    """`thinking` and `output_config.effort` as the chat's one word for both."""
    effort = (sent.get("output_config") or {}).get("effort")
    if (thinking := sent.get("thinking")) is not None:
        if thinking.get("type") not in THINKING:
            raise InvalidRequest(f"thinking.type must be one of {', '.join(THINKING)}", "thinking.type")
        effort = "none" if thinking["type"] == "disabled" else effort or _THINKING_EFFORT
    return {} if effort is None else {EFFORT: effort}


def _ineffective(sent: Mapping[str, Any]) -> list[str]:
    warnings = []
    if sent.get("thinking") is not None:
        warnings.append("thinking has an effect only if the chat template has a variable for it, without a budget")
    if (sent.get("output_config") or {}).get("effort") is not None:
        warnings.append("output_config.effort has an effect only if the chat template has a variable for it")
    if sent.get("context_management"):
        warnings.append("context_management has no effect")
    if sent.get("mcp_servers"):
        warnings.append("mcp_servers are left out; this server calls none")
    return warnings
