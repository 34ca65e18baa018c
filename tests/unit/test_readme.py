"""What the documents tell is there: commands, options, folders, files, and the curl lines' parameters."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tritonlm.cli import app
from tritonlm.contract import SamplingParameters
from tritonlm.contract.parameters import fields
from tritonlm.contract.tensors import CONTROL, LM_INPUTS
from tritonlm.gateway.schemas import ChatRequest, CompletionRequest
from typer.core import TyperGroup

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")])


def lines_of_code(document: Path) -> Iterator[str]:
    """The lines inside fences, those indented as code, and `code` within sentences; but no output (```text)."""
    text = re.sub(r"^```text\n.*?^```\n", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ").split("  #")[0].strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def commands(start: str) -> list[tuple[str, list[str]]]:
    found = [(f"{d.relative_to(ROOT)}: {line}", line) for d in DOCUMENTS for line in lines_of_code(d)]
    return [(where, shlex.split(line)) for where, line in found if re.match(start, line)]


SCRIPTS = dict(commands(r"scripts/[a-z_]+( |$)"))
CLI = dict(commands(r"tritonlm [a-z]+"))
CURLS = dict(commands(r"curl "))


def test_there_is_something_to_check() -> None:
    assert ROOT / "README.md" in DOCUMENTS
    assert {words[0] for words in SCRIPTS.values()} >= {"scripts/serve", "scripts/test", "scripts/bench"}
    assert CLI
    assert len(CURLS) >= 5


@pytest.mark.parametrize("where", SCRIPTS)
def test_a_script_that_is_told_of_is_there(where: str) -> None:
    name, *arguments = SCRIPTS[where]
    assert os.access(ROOT / name, os.X_OK)
    if name == "scripts/bench" and arguments:
        assert (ROOT / "scripts" / "benchmarks" / f"{arguments[0]}.py").is_file()


@pytest.mark.parametrize("where", CLI)
def test_a_command_that_is_told_of_is_there_with_its_options(where: str) -> None:
    _, name, *arguments = CLI[where]
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    subcommand = command.get_command(typer.Context(command), name)
    assert subcommand is not None, f"there is no command {name}"
    while arguments and hasattr(subcommand, "commands"):
        # A group: its own command comes next.
        subcommand = subcommand.commands[arguments.pop(0)]
    known = {option for parameter in subcommand.params for option in parameter.opts} | {"--help"}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.parametrize("where", CURLS)
def test_a_curl_line_sends_only_what_exists(where: str) -> None:
    words = CURLS[where]
    body = json.loads(words[words.index("-d") + 1])
    for route, schema in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        if any(route in word for word in words):
            assert set(body) <= set(schema.model_fields)
            assert (ROOT / "model_repository" / body["model"]).is_dir()
            return
    path = next(word for word in words if "/v2/models/" in word)
    assert (ROOT / "model_repository" / path.split("/v2/models/")[1].split("/")[0]).is_dir()
    parameters = {spec.name for spec in fields(SamplingParameters)}
    tensors = {spec.name for spec in (*LM_INPUTS, CONTROL)}
    assert set(body) <= parameters | tensors
    assert set(json.loads(body.get("sampling_parameters", "{}"))) <= parameters


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_and_folders_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    rows = re.findall(r"^\| \[?`([\w/.]+)`", text, flags=re.MULTILINE)
    for name in rows:
        if name.endswith("/") or name.endswith(".py"):
            assert (document.parent / name).exists(), name


def test_every_script_is_listed() -> None:
    listed = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "scripts").iterdir():
        if path.is_file() and not path.name.startswith("_") and path.name != "README.md":
            assert f"| `{path.name}` |" in listed


def test_every_room_of_the_engine_is_told_of() -> None:
    told = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "model_repository" / "generate" / "1" / "engine").glob("[a-z]*.py"):
        assert f"`{path.stem}`" in told
