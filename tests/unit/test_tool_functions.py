"""`tritonlm chat --tools FILE.py`: functions as tools, and their calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from tritonlm.commands.tool_functions import ToolFunctions
from tritonlm.serving import ServingError

SOURCE = '''
from __future__ import annotations
from pathlib import Path
from typing import Literal

def weather(city: str, days: int = 1, unit: Literal["c", "f"] = "c") -> dict:
    """The weather in a city.

    As of today.

    Args:
        city: its name, such as Paris
        days (int): how many days
    Returns:
        degrees: of each day
    """
    return {"city": city, "days": days, "unit": unit}

def fails() -> str:
    """Fails."""
    raise ValueError("no network")

def _hidden(): ...
'''


@pytest.fixture
def functions(tmp_path: Path) -> ToolFunctions:
    return ToolFunctions.of(write(tmp_path, SOURCE))


def write(folder: Path, source: str) -> Path:
    file = folder / "tools.py"
    file.write_text(source, encoding="utf-8")
    return file


def test_type_hints_and_docstrings_become_a_schema(functions: ToolFunctions) -> None:
    weather, fails = (tool["function"] for tool in functions.definitions)
    assert weather == {
        "name": "weather",
        "description": "The weather in a city.\n\nAs of today.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name, such as Paris"},
                "days": {"type": "integer", "default": 1, "description": "how many days"},
                "unit": {"enum": ["c", "f"], "type": "string", "default": "c"},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    assert (fails["name"], fails["description"], fails["parameters"]["properties"]) == ("fails", "Fails.", {})


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("weather", '{"city": "Bern"}', '{"city": "Bern", "days": 1, "unit": "c"}'),
        ("weather", '{"city": "Bern", "days": 2, "unit": "k"}', "error: unit: Input should be 'c' or 'f'"),
        ("weather", '{"town": "Bern"}', "error: city: Field required"),
        ("weather", '{"city"', "error: "), ("fails", "{}", "error: ValueError: no network"),
        ("_hidden", "{}", "error: there is no function _hidden"), ("Path", "{}", "error: there is no function Path"),
    ],
)  # fmt: skip
def test_a_call_is_checked_and_an_error_is_its_result(
    functions: ToolFunctions, name: str, arguments: str, result: str
) -> None:
    assert functions.run(name, arguments).startswith(result)


def test_a_call_is_shown_as_python(functions: ToolFunctions) -> None:
    assert functions.shown("weather", '{"city": "Bern", "days": 2}') == "weather(city='Bern', days=2)"
    assert functions.shown("weather", '{"ci') == 'weather({"ci)'


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1", "defines no function"), ("1 / 0", "ZeroDivisionError"), ("def f(a): ...", "no type hint for a"),
        ("def f(*a: int): ...", "names only"), ("def f(a: 'Nowhere'): ...", "cannot be read"),
        ("class A: ...\ndef f(a: A): ...", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, source: str, problem: str) -> None:
    with pytest.raises(ServingError, match=problem):
        ToolFunctions.of(write(tmp_path, source))
    with pytest.raises(ServingError, match="is no Python file"):
        ToolFunctions.of(tmp_path / "other.py")
