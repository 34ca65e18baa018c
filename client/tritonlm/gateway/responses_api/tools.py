"""The tools of the Responses API as those of chats. Hosted tools, which no local server has, are left out and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import InvalidRequest

from .items import CUSTOM_INPUT

_CUSTOM_PARAMETERS = {
    "type": "object", "properties": {CUSTOM_INPUT: {"type": "string"}}, "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}  # fmt: skip
_MODES = ("none", "auto", "required")


@dataclass
class ChatTools:
    """The chat's arguments, and which functions stand for custom tools."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    custom: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)

    def arguments(self, parallel: bool | None) -> dict[str, Any]:
        """Nothing where there are no tools: the fields around them then have no meaning."""
        if not self.tools:
            return {}
        values = {"tools": self.tools, "tool_choice": self.tool_choice, "parallel_tool_calls": parallel}
        return {name: value for name, value in values.items() if value is not None}


def read_tools(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None) -> ChatTools:
    result, custom = ChatTools(), set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        kind = tool.get("type")
        if kind == "function":
            result.tools.append({"type": "function", "function": _function(tool, where)})
        elif kind == "custom":
            custom.add(name := _name(tool, where))
            description = _optional_text(tool, "description", where)
            function = {"name": name, **description, "parameters": _CUSTOM_PARAMETERS}
            result.tools.append({"type": "function", "function": function})
            if (tool.get("format") or {"type": "text"}) != {"type": "text"}:
                result.warnings.append(f"{where}.format: the grammar of the custom tool {name} is not enforced")
        elif isinstance(kind, str) and kind:
            result.warnings.append(f"{where}: the hosted tool {kind[:60]} is left out; this server has none")
        else:
            raise InvalidRequest(f"{where}.type must be a string such as function", f"{where}.type")
    result.custom = frozenset(custom)
    _choose(result, choice)
    return result


def _function(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": _name(tool, where), **_optional_text(tool, "description", where)}
    parameters, strict = tool.get("parameters"), tool.get("strict")
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            raise InvalidRequest(f"{where}.parameters must be a JSON schema", f"{where}.parameters")
        function["parameters"] = parameters
    if strict is not None:
        if not isinstance(strict, bool):
            raise InvalidRequest(f"{where}.strict must be true or false", f"{where}.strict")
        function["strict"] = strict
    return function


def _choose(result: ChatTools, choice: str | Mapping[str, Any] | None) -> None:
    """Set the tool choice; a list of allowed tools removes the others."""
    if choice is None:
        return
    if isinstance(choice, str):
        if choice not in _MODES:
            raise InvalidRequest(f"tool_choice must be one of {', '.join(_MODES)}, or an object", "tool_choice")
        result.tool_choice = choice
    elif choice.get("type") in ("function", "custom"):
        name = _name(choice, "tool_choice")
        _check_known(result, name)
        result.tool_choice = {"type": "function", "function": {"name": name}}
    elif choice.get("type") == "allowed_tools":
        mode, allowed = choice.get("mode"), choice.get("tools")
        if mode not in ("auto", "required") or not isinstance(allowed, list):
            raise InvalidRequest("tool_choice must have the mode auto or required, and tools", "tool_choice")
        names = {tool.get("name") for tool in allowed if isinstance(tool, Mapping)}
        result.tools = [tool for tool in result.tools if tool["function"]["name"] in names]
        result.tool_choice = mode
    else:
        raise InvalidRequest("tool_choice names a hosted tool, and this server has none", "tool_choice")
    if not result.tools and result.tool_choice == "required":
        raise InvalidRequest("tool_choice requires a tool, and no function tool was sent", "tool_choice")


def _check_known(result: ChatTools, name: str) -> None:
    if all(tool["function"]["name"] != name for tool in result.tools):
        raise InvalidRequest(f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")


def _name(tool: Mapping[str, Any], where: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= 128:
        raise InvalidRequest(f"{where}.name must be a string of 1 to 128 characters", f"{where}.name")
    return name


def _optional_text(tool: Mapping[str, Any], name: str, where: str) -> dict[str, str]:
    value = tool.get(name)
    if value is None:
        return {}
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} must be a string", f"{where}.{name}")
    return {name: value}
