"""README.md and the documents match the code: commands, options, folders, files, links, curl lines' parameters."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from tritonlm.checkpoints.gguf.architectures import ARCHITECTURES
from tritonlm.cli import app
from tritonlm.client.messages_api.schemas import MessageRequest
from tritonlm.client.responses_api.schemas import ResponseRequest
from tritonlm.contract import SamplingParameters
from tritonlm.contract.parameters import fields
from tritonlm.contract.structured_outputs import OTHER_NAMES
from tritonlm.contract.tensors import CONTROL, LM_INPUTS
from tritonlm.gateway.http.schemas import ChatRequest, CompletionRequest
from tritonlm.gateway.routes.adapters import LoadAdapter, UnloadAdapter
from tritonlm.gateway.scoring.schemas import ScoreRequest
from typer.core import TyperGroup

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "model_repository" / "generate" / "1" / "engine"
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
# The README is one page; details are in the other documents.
MAX_README_LINES = 150


def code_lines(document: Path) -> Iterator[str]:
    """The lines inside fences, lines indented as code, and `code` within sentences; without output (```text)."""
    text = re.sub(r"^```text\n.*?^```\n", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ").split("  #")[0].strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(pattern: str) -> list[tuple[str, list[str]]]:
    lines = [(f"{d.relative_to(ROOT)}: {line}", line) for d in DOCUMENTS for line in code_lines(d)]
    return [(location, shlex.split(line)) for location, line in lines if re.match(pattern, line)]


SCRIPTS = dict(commands(r"scripts/[a-z_]+( |$)"))
CLI = dict(commands(r"tritonlm [a-z]+"))
CURLS = dict(commands(r"curl "))


def test_the_documents_contain_commands_and_curl_lines() -> None:
    assert ROOT / "README.md" in DOCUMENTS
    assert {words[0] for words in SCRIPTS.values()} >= {"scripts/serve", "scripts/test", "scripts/bench"}
    assert CLI
    assert len(CURLS) >= 12
    for page in ("README.md", "docs/api.md"):
        assert any(location.startswith(f"{page}: ") for location in CURLS), page
    assert any(location.startswith("docs/cli.md: ") for location in CLI)


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_each_row_of_the_features_is_linked_to_its_test() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Features\n")[1].split("\n## ")[0]
    _, rule, *rows = [line.split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert rule[0].startswith("|---")
    assert len(rows) > 20
    for row in rows:
        assert re.fullmatch(r"\[yes\]\(tests/[\w/]+/test_\w+\.py\)(, \[yes\]\(tests/[\w/]+/test_\w+\.py\))*", row[1]), (
            row[0]
        )


def test_the_readme_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("location", SCRIPTS)
def test_a_documented_script_exists(location: str) -> None:
    name, *arguments = SCRIPTS[location]
    assert os.access(ROOT / name, os.X_OK)
    if name == "scripts/bench" and arguments:
        assert (ROOT / "scripts" / "benchmarks" / f"{arguments[0]}.py").is_file()


@pytest.mark.parametrize("location", CLI)
def test_a_documented_command_exists_with_its_options(location: str) -> None:
    _, name, *arguments = CLI[location]
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    subcommand = command.get_command(typer.Context(command), name)
    assert subcommand is not None, f"there is no command {name}"
    while arguments and hasattr(subcommand, "commands"):
        # A group: the next word is its command.
        subcommand = subcommand.commands[arguments.pop(0)]
    known = {option for parameter in subcommand.params for option in parameter.opts} | {"--help"}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


SCHEMAS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest, "/v1/responses": ResponseRequest,
    "/v1/messages": MessageRequest,
    "/v1/score": ScoreRequest, "/v1/load_lora_adapter": LoadAdapter, "/v1/unload_lora_adapter": UnloadAdapter,
}  # fmt: skip


@pytest.mark.parametrize("location", CURLS)
def test_a_curl_line_sends_only_known_fields(location: str) -> None:
    words = CURLS[location]
    body = json.loads(words[words.index("-d") + 1])
    for route, schema in SCHEMAS.items():
        if any(route in word for word in words):
            assert set(body) <= set(schema.model_fields)
            # An adapter is named behind its base: fable:NAME.
            model = body["base_model" if "adapter" in route else "model"].partition(":")[0]
            assert (ROOT / "model_repository" / model).is_dir()
            return
    path = next(word for word in words if "/v2/models/" in word)
    assert (ROOT / "model_repository" / path.split("/v2/models/")[1].split("/")[0]).is_dir()
    parameters = {*(spec.name for spec in fields(SamplingParameters)), *OTHER_NAMES}
    tensors = {spec.name for spec in (*LM_INPUTS, CONTROL)}
    assert set(body) <= parameters | tensors
    assert set(json.loads(body.get("sampling_parameters", "{}"))) <= parameters


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_and_listed_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        file = document.parent / target if target else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), f"{target}#{anchor}"
    rows = re.findall(r"^\| \[?`([\w/.]+)`", text, flags=re.MULTILINE)
    for name in rows:
        if name.endswith("/") or name.endswith(".py"):
            assert (document.parent / name).exists(), name


def test_every_script_is_listed() -> None:
    listed = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "scripts").iterdir():
        if path.is_file() and not path.name.startswith("_") and path.name != "README.md":
            assert f"| `{path.name}` |" in listed


def test_every_module_of_the_engine_is_documented() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [path for path in ENGINE.glob("**/[a-z]*.py") if path.parent.name != "families"]
    assert [path.name for path in modules if f"`{path.stem}`" not in page] == []


def test_every_architecture_of_a_gguf_file_is_documented() -> None:
    page = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} >= set(ARCHITECTURES)


def test_every_family_is_documented() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    for path in (ENGINE / "runners" / "native" / "families").glob("[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        types = re.findall(r'"(\w+)"', re.findall(r"^MODEL_TYPES = \((.*)\)$", text, flags=re.MULTILINE)[0])
        row = f"| {', '.join(f'`{name}`' for name in types)} | [{path.name}]"
        assert f"{row}(../{path.relative_to(ROOT)}) | {len(text.splitlines())} |" in page


HOPS = re.findall(
    r"`((?:[\w]+/)+[\w]+\.(?:py|cpp)):([\w.]+)`",
    (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"),
)


def test_the_architecture_page_lists_the_hops_of_a_prompt() -> None:
    assert len(HOPS) >= 20


@pytest.mark.parametrize(("file", "name"), HOPS, ids=[f"{file}:{name}" for file, name in HOPS])
def test_a_hop_of_a_prompt_exists(file: str, name: str) -> None:
    roots = (ROOT / "client" / "tritonlm", ROOT / "model_repository")
    (source,) = (root / file for root in roots if (root / file).is_file())
    text = source.read_text(encoding="utf-8")
    for part in name.split("."):
        assert re.search(rf"\b(class|def|void) {part}\b", text), f"{file} has no {part}"
