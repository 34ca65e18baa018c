"""Tools of other APIs as those of a chat: what both translations need. It knows the chat's form only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonlm.contract import InvalidRequest

MAX_TOOLS = 512


@dataclass
class ChatTools:
    """The chat's arguments, and which functions stand for custom tools."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    custom: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)

    def add(self, function: Mapping[str, Any]) -> None:
        self.tools.append({"type": "function", "function": dict(function)})

    def leave_out(self, where: str, kind: str) -> None:
        self.warnings.append(f"{where}: the hosted tool {kind[:60]} is left out; this server has none")

    def choose(self, name: str) -> None:
        """Require the call of one function."""
        if all(tool["function"]["name"] != name for tool in self.tools):
            raise InvalidRequest(f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")
        self.tool_choice = {"type": "function", "function": {"name": name}}

    def check(self) -> None:
        if not self.tools and self.tool_choice == "required":
            raise InvalidRequest("tool_choice requires a tool, and no function tool was sent", "tool_choice")

    def arguments(self, parallel: bool | None) -> dict[str, Any]:
        """Nothing where there are no tools: the fields around them then have no meaning."""
        if not self.tools:
            return {}
        values = {"tools": self.tools, "tool_choice": self.tool_choice, "parallel_tool_calls": parallel}
        return {name: value for name, value in values.items() if value is not None}


def read_name(tool: Mapping[str, Any], where: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= 128:
        raise InvalidRequest(f"{where}.name must be a string of 1 to 128 characters", f"{where}.name")
    return name


def read_function(tool: Mapping[str, Any], where: str, schema_field: str) -> dict[str, Any]:
    """A function of a chat; `schema_field` is the name of its parameters' schema."""
    function: dict[str, Any] = {"name": read_name(tool, where)}
    for field_name, kind, expected, name in (
        ("description", str, "a string", "description"),
        (schema_field, Mapping, "a JSON schema", "parameters"),
        ("strict", bool, "true or false", "strict"),
    ):
        value = tool.get(field_name)
        if value is None:
            continue
        if not isinstance(value, kind):
            raise InvalidRequest(f"{where}.{field_name} must be {expected}", f"{where}.{field_name}")
        function[name] = value
    return function
