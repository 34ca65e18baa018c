"""The functions of a Python file as tools: schemas from type hints, descriptions from docstrings, and their calls.

It knows Python functions and JSON schemas, and no models.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from tritonlm.serving import ServingError

_MODULE = "tritonlm_chat_tools"
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters):\s*$", re.MULTILINE)
_END = re.compile(r"^\s*(Returns|Raises|Yields|Examples?):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.+)$", re.MULTILINE)
_MAX_RESULT_CHARACTERS = 20_000


class ToolFunctions:
    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = dict(functions)
        self._models = {name: _model_of(name, function) for name, function in functions.items()}

    @classmethod
    def of(cls, file: Path) -> ToolFunctions:
        """The public functions that this file defines. The file is executed."""
        spec = importlib.util.spec_from_file_location(_MODULE, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ServingError(f"{file} is no Python file; give one whose functions are the tools")
        module = importlib.util.module_from_spec(spec)
        # Type hints are resolved in the module.
        sys.modules[_MODULE] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the file is the user's program and may raise anything
            raise ServingError(f"{file} fails: {type(error).__name__}: {error}") from error
        functions = {
            name: value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == _MODULE and not name.startswith("_")
        }
        if not functions:
            raise ServingError(f"{file} defines no function; write one with type hints and a docstring")
        return cls(functions)

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """As the argument `tools` of a chat takes them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": name, "description": _description(function), "parameters": _schema(self._models[name])
                },
            }
            for name, function in self._functions.items()
        ]  # fmt: skip

    def shown(self, name: str, arguments: str) -> str:
        """A call as Python, or as the model wrote it if its arguments are no JSON object."""
        try:
            values = json.loads(arguments)
        except ValueError:
            return f"{name}({arguments})"
        if not isinstance(values, dict):
            return f"{name}({arguments})"
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"

    def run(self, name: str, arguments: str) -> str:
        """The result as text; an error is one, too, so that the model learns of it."""
        if name not in self._functions:
            return f"error: there is no function {name}"
        try:
            values = self._models[name].model_validate_json(arguments)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            return f"error: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        try:
            result = self._functions[name](**{field: getattr(values, field) for field in values.model_fields_set})
        except Exception as error:  # the function is the user's and may raise anything
            return f"error: {type(error).__name__}: {error}"
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        return text[:_MAX_RESULT_CHARACTERS]


def _model_of(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    """A model of the function's parameters, which checks calls and knows their schema."""
    documented = _documented(function)
    fields: dict[str, Any] = {}
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ServingError(f"{name} has the parameter {parameter}; tools have parameters with names only")
            if parameter.name not in hints:
                raise ServingError(f"{name} has no type hint for {parameter.name}")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (
                hints[parameter.name], Field(default, description=documented.get(parameter.name))
            )  # fmt: skip
        return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ServingError(f"the type hints of {name} cannot be read: {str(error)[:200]}") from None


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    schema.pop("title", None)
    for value in schema.get("properties", {}).values():
        value.pop("title", None)
    return schema


def _description(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    section = _SECTION.search(text) or _END.search(text)
    return (text[: section.start()] if section else text).strip()


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """The descriptions of parameters in a docstring's section `Args:`."""
    text = inspect.getdoc(function) or ""
    section = _SECTION.search(text)
    if section is None:
        return {}
    end = _END.search(text, section.end())
    return dict(_ARGUMENT.findall(text[section.end() : end.start() if end else len(text)]))
