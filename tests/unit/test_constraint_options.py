"""The options `--schema`, `--regex`, `--choice`, `--grammar`: what they send, and mistakes named by file and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tritonlm.cli import app
from tritonlm.commands.constraints import Constraint, read_constraint
from tritonlm.contract import InvalidRequest
from typer.testing import CliRunner

SCHEMA = '{"type": "object",\n "properties": {}}'


def files(folder: Path, **texts: str | bytes) -> dict[str, Path]:
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / name
        paths[name].write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


def test_each_option_is_a_kind_of_structured_outputs(tmp_path: Path) -> None:
    written = files(tmp_path, schema=SCHEMA, grammar='start: "é"')
    sent: dict[str, Any] = {"schema": None, "regex": None, "choices": None, "grammar": None}
    assert read_constraint(**sent) == Constraint({}, "")
    expected: list[tuple[str, Any, dict[str, Any]]] = [
        ("schema", written["schema"], {"json": {"type": "object", "properties": {}}}),
        ("regex", "a+", {"regex": "a+"}),
        ("choices", ["a", "b"], {"choice": ["a", "b"]}),
        ("grammar", written["grammar"], {"grammar": 'start: "é"'}),
    ]
    for name, value, parameter in expected:
        assert read_constraint(**{**sent, name: value}).parameters == {"structured_outputs": parameter}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type":\n  "object",,}', ":2:12 is not valid JSON"),
        ("", ":1:1 is not valid JSON"),
        (b"\xff\xfe{}", " is not UTF-8 (byte 0)"),
        ("[1]", " must be a JSON schema"),
        ("[" * 100_000, " is nested too deeply"),
        ('{"a": ' * 200 + "1" + "}" * 200, " must not be nested more than"),
        (None, " cannot be read: No such file"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_mistake_in_a_schema_is_one_line_with_file_and_place(
    tmp_path: Path, text: str | bytes | None, message: str, command: str
) -> None:
    file = tmp_path / "animal.json" if text is None else files(tmp_path, schema=text)["schema"]
    prompt = ["a"] if command == "generate" else []
    # No server answers there: the mistake is found before it is asked.
    result = CliRunner().invoke(app, [command, *prompt, "--schema", str(file), "--triton", "127.0.0.1:1"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}{message}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_two_constraints_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--regex and --choice both constrain the output"):
        read_constraint(None, "a", ["b"], None)
    with pytest.raises(InvalidRequest, match=r"^--choice must be a list"):
        read_constraint(None, None, [""], None)
    with pytest.raises(InvalidRequest, match=r"empty\.lark must be a string that is not empty"):
        read_constraint(None, None, None, files(tmp_path, **{"empty.lark": ""})["empty.lark"])


def test_a_servers_error_about_the_constraint_names_the_file() -> None:
    constraint = Constraint({"structured_outputs": {"json": {}}}, "animal.json")
    name = "structured_outputs.json"
    with (
        pytest.raises(InvalidRequest, match=r"^animal\.json: contains is not supported \(at /a\)$"),
        constraint.named(),
    ):
        raise InvalidRequest(f"{name}: contains is not supported (at /a)", name)
    with pytest.raises(InvalidRequest, match=r"^temperature must be"), constraint.named():
        raise InvalidRequest("temperature must be a number", "temperature")
