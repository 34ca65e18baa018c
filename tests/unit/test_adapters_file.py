"""The adapters file: names, paths, and writers that do not lose each other's entries."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from tritonlm.contract import AdapterNotFound, CheckpointError, InvalidRequest
from tritonlm.contract.adapters_file import (
    AdapterEntry,
    adapters_file,
    add_adapter,
    check_name,
    edit_adapters,
    read_adapters,
    remove_adapter,
)


def test_an_added_adapter_is_read_and_a_removed_one_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "adapters" / "lm.json"
    assert read_adapters(file) == {}
    entry = AdapterEntry("/adapters/pirate", source="org/pirate")
    add_adapter(file, "pirate", entry)
    assert read_adapters(file) == {"pirate": entry}
    assert json.loads(file.read_text()) == {"pirate": {"path": "/adapters/pirate", "source": "org/pirate"}}
    assert remove_adapter(file, "pirate") == entry
    assert read_adapters(file) == {}


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "lm.json"
    add_adapter(file, "pirate", AdapterEntry("/one"))
    with pytest.raises(InvalidRequest, match="there is an adapter 'pirate' already; remove it first"):
        add_adapter(file, "pirate", AdapterEntry("/two"))
    assert read_adapters(file)["pirate"].path == "/one"
    add_adapter(file, "pirate", AdapterEntry("/two"), replace=True)
    assert read_adapters(file)["pirate"].path == "/two"


def test_removing_an_unknown_adapter_names_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "lm.json"
    add_adapter(file, "b", AdapterEntry("/b"))
    add_adapter(file, "a", AdapterEntry("/a"))
    with pytest.raises(AdapterNotFound, match="lm has no adapter 'c'; it has a, b"):
        remove_adapter(file, "c")


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a:b", "a b", "ä", "a" * 65, 5, None])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(InvalidRequest, match="adapter must be 1 to 64 letters"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "7", "pirate-v1.5_b", "a" * 64])
def test_names_of_letters_digits_dots_and_dashes_are_names(name: str) -> None:
    assert check_name(name) == name


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="path must be an absolute folder"):
        AdapterEntry("adapters/pirate")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "must be an object"),
        ('{"a": 5}', "must be an object such as"),
        ('{"a": {"path": 5}}', "must be an object such as"),
        ('{"a": {}}', "needs a path"),
        ('{"a": {"path": "/a", "weight": "2"}}', "may have source and declared_by only"),
        ('{"a": {"path": "a"}}', "must be an absolute folder"),
        ('{"a/b": {"path": "/a"}}', "must be 1 to 64 letters"),
    ],
)
def test_a_broken_file_is_named_with_its_problem_and_is_not_written_over(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "lm.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=problem) as error:
        add_adapter(file, "new", AdapterEntry("/new"))
    assert str(file) in error.value.message
    assert file.read_text() == text


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "lm.json"
    names = [f"adapter-{number}" for number in range(24)]
    writers = [threading.Thread(target=add_adapter, args=(file, name, AdapterEntry(f"/{name}"))) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(read_adapters(file)) == sorted(names)


def test_an_edit_that_fails_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "lm.json"
    add_adapter(file, "a", AdapterEntry("/a"))

    def fail() -> None:
        with edit_adapters(file) as adapters:
            adapters.clear()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(read_adapters(file)) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lm.json.lock", "lm.json"]


def test_a_folder_holds_a_file_for_each_language_model(tmp_path: Path) -> None:
    assert adapters_file(tmp_path, "lm-1.5") == tmp_path / "lm-1.5.json"
    assert adapters_file(tmp_path / "own.json", "lm") == tmp_path / "own.json"
