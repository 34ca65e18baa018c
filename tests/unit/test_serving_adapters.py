"""Adapters before a server starts: `tritonlm adapters`, the registry's `adapters`, `tritonlm serve --adapter`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.adapter_folders import adapter_folder
from fakes.checkpoints import write_checkpoint
from tritonlm.cli import app
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter, read_adapters
from tritonlm.serving import ServingError, Settings
from tritonlm.serving.adapters import Declared, declare_adapters, option_adapters
from tritonlm.serving.backend import Installation
from tritonlm.serving.model_selection import select_models, write_models
from tritonlm.serving.settings import read_settings
from tritonlm.serving.triton import triton_environment
from typer.testing import CliRunner, Result

Run = Callable[..., Result]


@pytest.fixture
def pirate(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "pirate")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def run(folder: Path) -> Run:
    def call(*words: str) -> Result:
        return CliRunner().invoke(app, ["adapters", *words], env={"TRITONLM_ADAPTERS_FOLDER": str(folder)})

    return call


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_an_adapter_is_added_listed_replaced_and_removed(run: Run, folder: Path, pirate: Path, tmp_path: Path) -> None:
    assert run("add", "pirate", "--base", "lm", "--path", str(pirate)).exit_code == 0
    assert read_adapters(folder / "lm.json") == {"pirate": AdapterEntry(str(pirate))}
    assert json.loads(run("list", "--json").stdout) == [
        {"name": "pirate", "base": "lm", "path": str(pirate), "source": ""}
    ]
    assert "pirate" in run("list").stdout
    other = adapter_folder(tmp_path / "other")
    again = ("add", "pirate", "--base", "lm", "--path", str(other))
    assert "--replace replaces it" in refusal(run(*again))
    assert run(*again, "--replace").exit_code == 0
    assert read_adapters(folder / "lm.json")["pirate"].path == str(other)
    assert run("remove", "pirate").exit_code == 0
    assert read_adapters(folder / "lm.json") == {}
    assert "there is no adapter pirate" in refusal(run("remove", "pirate"))
    assert pirate.is_dir()


@pytest.mark.parametrize(
    ("name", "base", "message"),
    [
        ("a/b", "lm", "adapter must be 1 to 64 letters"),
        ("a", "../lm", "--base must be the name of a language model"),
        ("lm", "lm", "lm is a language model already"),
        ("abacus", "lm", "abacus is a language model already"),
        ("poet", "lm", "poet is an adapter of other already"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(
    run: Run, folder: Path, pirate: Path, name: str, base: str, message: str
) -> None:
    add_adapter(folder / "other.json", "poet", AdapterEntry("/poet"))
    assert message in refusal(run("add", name, "--base", base, "--path", str(pirate)))
    assert [file.name for file in folder.glob("*.json")] == ["other.json"]


def test_a_language_model_does_not_get_the_name_of_an_adapter(folder: Path) -> None:
    add_adapter(folder / "lm.json", "pirate", AdapterEntry("/pirate"))
    environment = {"TRITONLM_ADAPTERS_FOLDER": str(folder)}
    result = CliRunner().invoke(app, ["add", "pirate", "--model", "org/pirate"], env=environment)
    assert "pirate is an adapter of lm already; choose another name" in refusal(result)


def test_a_folder_that_is_no_adapter_is_refused_with_the_reason(run: Run, folder: Path, tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        return refusal(run("add", "a", "--base", "lm", "--path", str(path)))

    assert "there is no folder" in problem(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no adapter_config.json: it is not an adapter in PEFT's format" in problem(empty)
    prompt = adapter_folder(tmp_path / "prompt", peft_type="PROMPT_TUNING")
    assert "peft_type must be LORA (got 'PROMPT_TUNING')" in problem(prompt)
    (prompt / "adapter_config.json").write_text("[")
    assert "cannot be read" in problem(prompt)
    (prompt / "adapter_model.safetensors").rename(prompt / "adapter_model.bin")
    assert "only pickled ones, which can run code and are not loaded" in problem(prompt)
    assert "is not a folder" in problem(prompt / "adapter_model.bin")
    assert not folder.exists()


def test_an_adapter_that_several_models_have_is_removed_from_one(run: Run, folder: Path) -> None:
    for lm in ("one", "two"):
        add_adapter(folder / f"{lm}.json", "pirate", AdapterEntry("/pirate"))
    assert "one and two have an adapter pirate; name one of them with --base" in refusal(run("remove", "pirate"))
    assert run("remove", "pirate", "--base", "two").exit_code == 0
    assert list(read_adapters(folder / "one.json")) == ["pirate"]


def test_an_option_names_its_model_or_means_the_first_one() -> None:
    assert option_adapters(["a=/x:y=z", "lm:b=org/b"], "first") == [
        Declared("first", "a", "/x:y=z"), Declared("lm", "b", "org/b")
    ]  # fmt: skip
    with pytest.raises(ServingError, match="--adapter a=/x names no language model; write LM:a=/x"):
        option_adapters(["a=/x"], "")
    with pytest.raises(ServingError, match="--adapter must be NAME=PATH or LM:NAME=PATH"):
        option_adapters(["/x"], "first")


def test_what_is_declared_no_more_is_removed_and_all_else_stays(folder: Path, pirate: Path) -> None:
    add_adapter(folder / "lm.json", "mine", AdapterEntry("/mine"))
    add_adapter(folder / "lm.json", "theirs", AdapterEntry("/theirs", "", "serve 9090"))
    declare_adapters(folder, {"serve 8000": [Declared("lm", "a", str(pirate)), Declared("other", "b", str(pirate))]})
    assert list(read_adapters(folder / "lm.json")) == ["mine", "theirs", "a"]
    assert list(read_adapters(folder / "other.json")) == ["b"]
    declare_adapters(folder, {"serve 8000": [Declared("lm", "c", str(pirate))]})
    assert list(read_adapters(folder / "lm.json")) == ["mine", "theirs", "c"]
    assert read_adapters(folder / "other.json") == {}


def test_a_declared_adapter_does_not_take_the_place_of_another(folder: Path, pirate: Path) -> None:
    add_adapter(folder / "lm.json", "a", AdapterEntry("/mine"))
    with pytest.raises(ServingError, match="lm has an adapter a already, from tritonlm adapters add; rename one"):
        declare_adapters(folder, {"registry": [Declared("lm", "a", str(pirate))]})
    with pytest.raises(ServingError, match="lm has two adapters b; rename one"):
        declare_adapters(folder, {"registry": [Declared("lm", "b", str(pirate)), Declared("lm", "b", "/x")]})
    with pytest.raises(ServingError, match="the adapter b of lm: there is no folder"):
        declare_adapters(folder, {"registry": [Declared("lm", "b", "/none")]})
    assert read_adapters(folder / "lm.json") == {"a": AdapterEntry("/mine")}


def test_nothing_is_written_where_nothing_changes(folder: Path, pirate: Path) -> None:
    declare_adapters(folder, {"registry": []})
    assert not folder.exists()
    declared = {"registry": [Declared("lm", "a", str(pirate))]}
    declare_adapters(folder, declared)
    before = (folder / "lm.json").stat().st_mtime_ns
    declare_adapters(folder, declared)
    assert (folder / "lm.json").stat().st_mtime_ns == before


def test_the_adapters_of_the_registry_and_of_the_options_are_there_at_the_start(
    tmp_path: Path, folder: Path, pirate: Path
) -> None:
    write_checkpoint(tmp_path / "lm")
    (tmp_path / "models.yaml").write_text("- name: mine\n  path: lm\n  adapters:\n    pirate: pirate\n")
    settings = read_settings(
        {
            "registry": tmp_path / "models.yaml",
            "checkpoint": [f"own={tmp_path / 'lm'}"],
            "adapter": [f"poet={pirate}", f"mine:bard={pirate}"],
            "adapters_folder": folder,
        }
    )
    write_models(settings, select_models(settings))
    assert read_adapters(folder / "mine.json") == {
        "pirate": AdapterEntry(str(pirate), declared_by=f"registry {tmp_path / 'models.yaml'}"),
        "bard": AdapterEntry(str(pirate), declared_by="serve 8000"),
    }
    assert list(read_adapters(folder / "own.json")) == ["poet"]


def test_a_registry_leaves_the_adapters_of_another_one(tmp_path: Path, folder: Path, pirate: Path) -> None:
    write_checkpoint(tmp_path / "lm")
    for name in ("first", "second", "first"):
        registry = tmp_path / f"{name}.yaml"
        registry.write_text(f"- name: {name}\n  path: lm\n  adapters:\n    pirate: pirate\n")
        settings = read_settings({"registry": registry, "adapters_folder": folder})
        write_models(settings, select_models(settings))
    assert [list(read_adapters(folder / f"{name}.json")) for name in ("first", "second")] == [["pirate"], ["pirate"]]


def test_the_engines_follow_the_folder_of_the_gateway(folder: Path) -> None:
    installation = Installation(folder, folder, "2.51")
    environment = triton_environment(installation, Settings(adapters_folder=folder))
    assert environment["TRITONLM_ADAPTERS_FILE"] == str(folder)
