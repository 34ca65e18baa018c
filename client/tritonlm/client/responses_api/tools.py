"""The tools of the Responses API as those of chats. Hosted tools, which no local server has, are left out and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tritonlm.client.chat_tools import ChatTools, read_function, read_name
from tritonlm.contract import InvalidRequest

from .items import CUSTOM_INPUT

_CUSTOM_PARAMETERS = {
    "type": "object", "properties": {CUSTOM_INPUT: {"type": "string"}}, "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}  # fmt: skip
_MODES = ("none", "auto", "required")


def read_tools(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None) -> ChatTools:
    result, custom = ChatTools(), set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        kind = tool.get("type")
        if kind == "function":
            result.add(read_function(tool, where, "parameters"))
        elif kind == "custom":
            function = read_function(tool, where, "")
            custom.add(function["name"])
            result.add({**function, "parameters": _CUSTOM_PARAMETERS})
            if (tool.get("format") or {"type": "text"}) != {"type": "text"}:
                name = function["name"]
                result.warnings.append(f"{where}.format: the grammar of the custom tool {name} is not enforced")
        elif isinstance(kind, str) and kind:
            result.leave_out(where, kind)
        else:
            raise InvalidRequest(f"{where}.type must be a string such as function", f"{where}.type")
    result.custom = frozenset(custom)
    if choice is not None:
        _choose(result, choice)
    result.check()
    return result


def _choose(result: ChatTools, choice: str | Mapping[str, Any]) -> None:
    """Set the tool choice; a list of allowed tools removes the others."""
    if isinstance(choice, str):
        if choice not in _MODES:
            raise InvalidRequest(f"tool_choice must be one of {', '.join(_MODES)}, or an object", "tool_choice")
        result.tool_choice = choice
    elif choice.get("type") in ("function", "custom"):
        result.choose(read_name(choice, "tool_choice"))
    elif choice.get("type") == "allowed_tools":
        mode, allowed = choice.get("mode"), choice.get("tools")
        if mode not in ("auto", "required") or not isinstance(allowed, list):
            raise InvalidRequest("tool_choice must have the mode auto or required, and tools", "tool_choice")
        names = [tool.get("name") for tool in allowed if isinstance(tool, Mapping)]
        result.tools = [tool for tool in result.tools if tool["function"]["name"] in names]
        result.tool_choice = mode
    else:
        raise InvalidRequest("tool_choice names a hosted tool, and this server has none", "tool_choice")
