"""Reads a caller's `tools` and `tool_choice`: which functions a model may call, must call, and in how many calls.

It checks everything that can be checked without a model; errors name the argument. Hosted tools, which run on their
provider's servers, are left out and named in a warning, so that agents that send them work all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tritonlm.contract import InvalidRequest
from tritonlm.contract.structured_outputs import MAX_DEPTH, is_deeper

MAX_TOOLS = 128
# Calls in one answer: a bound for models that do not stop by themselves.
MAX_CALLS = 16
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
# Without the dates of their versions.
HOSTED_TOOLS = frozenset(
    {
        "apply_patch", "bash", "code_execution", "code_interpreter", "computer", "computer_use", "computer_use_preview",
        "custom", "file_search", "image_generation", "local_shell", "mcp", "memory", "namespace", "shell",
        "str_replace_based_edit_tool", "text_editor", "tool_search", "web_fetch", "web_search", "web_search_preview",
    }
)  # fmt: skip
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True, eq=False)
class Function:
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any]
    # The arguments follow all of the schema, or a schema that cannot be enforced is refused.
    strict: bool
    # As templates take it.
    definition: dict[str, Any]
    # Its path in the request, for errors.
    path: str


@dataclass(frozen=True)
class Tools:
    """`shown` are rendered into the prompt, `callable` are those that this answer may call."""

    shown: tuple[Function, ...] = ()
    callable: tuple[Function, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    max_calls: int = MAX_CALLS
    warnings: tuple[str, ...] = ()

    @property
    def definitions(self) -> list[dict[str, Any]]:
        return [function.definition for function in self.shown]

    @property
    def schemas(self) -> dict[str, Any]:
        return {function.name: function.parameters for function in self.shown}

    @property
    def active(self) -> bool:
        return self.mode != "none"


def read_tools(tools: Any, tool_choice: Any = None, parallel_tool_calls: Any = None) -> Tools:
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise InvalidRequest("parallel_tool_calls must be true or false", "parallel_tool_calls")
    functions, warnings = _read_functions(tools)
    if not functions:
        if tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools with at least one function", "tool_choice")
        return Tools(warnings=warnings)
    mode, allowed, single = _read_choice(tool_choice, functions)
    if mode == "none":
        return Tools(warnings=warnings)
    calls = 1 if single or parallel_tool_calls is False else MAX_CALLS
    return Tools(functions, allowed, mode, calls, warnings)


def _read_functions(tools: Any) -> tuple[tuple[Function, ...], tuple[str, ...]]:
    if tools is None:
        return (), ()
    if not isinstance(tools, (list, tuple)) or len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools must be a list of at most {MAX_TOOLS} tools", "tools")
    functions: dict[str, Function] = {}
    hosted: dict[str, None] = {}
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if isinstance(kind, str) and re.sub(r"(_\d{4}_\d{2}_\d{2}|_\d{8})$", "", kind) in HOSTED_TOOLS:
            hosted[kind] = None
            continue
        function = _read_function(f"tools[{index}]", tool)
        if function.name in functions:
            raise InvalidRequest(f"tools holds two functions named {function.name!r}", f"tools[{index}].function.name")
        functions[function.name] = function
    warnings = tuple(f"the tool {kind} is left out: this server hosts no tools" for kind in hosted)
    return tuple(functions.values()), warnings


def _read_function(path: str, tool: Any) -> Function:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise InvalidRequest(f'{path} must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}', path)
    path = f"{path}.function"
    for field in function:
        if field not in _FUNCTION_FIELDS and function[field] is not None:
            raise InvalidRequest(f"{path} has no field {str(field)[:60]!r}; it has {', '.join(_FUNCTION_FIELDS)}", path)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{path}.name must have 1 to 128 characters of a-z, A-Z, 0-9, _, . and -", f"{path}.name")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{path}.description must be a string", f"{path}.description")
    strict, parameters = function.get("strict"), function.get("parameters")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"{path}.strict must be true or false", f"{path}.strict")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest(f"{path}.parameters must be a JSON schema", f"{path}.parameters")
    if is_deeper(parameters, MAX_DEPTH):
        raise InvalidRequest(
            f"{path}.parameters must not be nested more than {MAX_DEPTH} levels deep", f"{path}.parameters"
        )
    definition = {
        "type": "function",
        "function": {"name": name, "description": description or "", "parameters": dict(parameters)},
    }
    try:
        json.dumps(definition)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}.parameters is not valid JSON: {error}", f"{path}.parameters") from None
    return Function(name, dict(parameters), bool(strict), definition, path)


def _read_choice(
    choice: Any, functions: tuple[Function, ...]
) -> tuple[Literal["none", "auto", "required"], tuple[Function, ...], bool]:
    """The mode, the functions that may be called, and whether it is one call exactly."""
    if choice is None or choice == "auto":
        return "auto", functions, False
    if choice == "none":
        return "none", (), False
    if choice == "required":
        return "required", functions, False
    by_name = {function.name: function for function in functions}
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return "required", (_named(choice, by_name, "tool_choice"),), True
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
        tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if mode in ("auto", "required") and isinstance(tools, (list, tuple)) and tools:
            named = [
                _named(tool, by_name, f"tool_choice.allowed_tools.tools[{index}]") for index, tool in enumerate(tools)
            ]
            return ("auto" if mode == "auto" else "required"), tuple(dict.fromkeys(named)), False
    raise InvalidRequest(
        'tool_choice must be none, auto, required or {"type": "function", "function": {"name": "…"}}', "tool_choice"
    )


def _named(choice: Any, by_name: Mapping[str, Function], path: str) -> Function:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in by_name:
        raise InvalidRequest(f"{path} names {str(name)[:64]!r}, which is not among tools", path)
    return by_name[name]
