"""The registry file, and the model repository that is written from its entries."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes.checkpoints import write_checkpoint
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonlm.checkpoints.reference import HubModel, parse
from tritonlm.cli import app
from tritonlm.contract import CheckpointError
from tritonlm.serving import ServingError, Settings, preflight
from tritonlm.serving.entries import remove_entry as remove_models
from tritonlm.serving.entries import sync_registry, sync_repository, write_entry
from tritonlm.serving.model_selection import select_models
from tritonlm.serving.paths import model_repository
from tritonlm.serving.registry import Entry, add_entry, entry_of, make_entry, read_registry, remove_entry
from tritonlm.serving.repository import find_language_model
from typer.testing import CliRunner, Result

# An example from the documentation of an older system.
SEED = """[
  {
    "name": "GPT3-dev-350m-2805",
    "hf_repo": "k050506koch/GPT3-dev-350m-2805",
    "dtype": "float16",
    "device": "auto",
    "max_context_tokens": 4096
  }
]"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "runs" / "step_2920")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_an_older_systems_registry_is_read_unchanged(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"registry{suffix}"
    file.write_text(SEED, encoding="utf-8")
    (entry,) = read_registry(file)
    assert (entry.name, entry.hf_repo) == ("GPT3-dev-350m-2805", "k050506koch/GPT3-dev-350m-2805")
    assert entry.engine_parameters() == {"dtype": "float16", "device": "auto", "max_context_tokens": "4096"}
    assert not entry.preload


def test_adding_and_removing_entries_keeps_comments(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("# mine\n- name: first  # keep\n  path: one\n", encoding="utf-8")
    add_entry(file, make_entry(name="second", path="two", max_sequences=4))
    text = file.read_text(encoding="utf-8")
    assert "# mine" in text
    assert "# keep" in text
    assert [entry.name for entry in read_registry(file)] == ["first", "second"]
    assert read_registry(file)[1].path == tmp_path / "two"
    remove_entry(file, "first")
    assert [entry.max_sequences for entry in read_registry(file)] == [4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".models.yaml.lock", "models.yaml"]


def test_what_is_added_at_once_is_in_the_registry_and_in_its_repository(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    file, names = tmp_path / "models.yaml", {f"lm{number}" for number in range(8)}
    together = threading.Barrier(len(names), timeout=60)

    def add(name: str) -> Path:
        together.wait()
        add_entry(file, make_entry(name=name, path=checkpoint))
        return sync_registry(file)

    with ThreadPoolExecutor(len(names)) as pool:
        (folder,) = set(pool.map(add, names))
    assert {entry.name for entry in read_registry(file)} == names
    assert names <= {path.name for path in folder.iterdir()}


def test_an_edited_registry_keeps_its_mode_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    file, link = tmp_path / "shared" / "models.yaml", tmp_path / "models.yaml"
    link.symlink_to(file)
    add_entry(link, make_entry(name="one", hf_repo="org/one"))
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o640)
    add_entry(link, make_entry(name="two", hf_repo="org/two"))
    assert link.is_symlink()
    assert [entry.name for entry in read_registry(file)] == ["one", "two"]
    assert file.stat().st_mode & 0o777 == 0o640


def test_the_first_entry_creates_the_registry_file(tmp_path: Path) -> None:
    for name in ("new.json", "deep/new.yaml"):
        add_entry(tmp_path / name, make_entry(name="lm", hf_repo="org/lm"))
        assert read_registry(tmp_path / name)[0].hf_repo == "org/lm"
    assert json.loads((tmp_path / "new.json").read_text())[0] == {"name": "lm", "hf_repo": "org/lm"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"name": "a"}]', "a: exactly one of path and hf_repo is needed"),
        ('[{"name": "a", "path": "x", "hf_repo": "y"}]', "a: exactly one of"),
        ('[{"name": "a", "path": "x", "colour": "red"}]', "a: colour: Extra inputs are not permitted"),
        ('[{"name": "../a", "path": "x"}]', "../a: name: must be 1 to 100 letters, digits, dots"),
        ('[{"name": "a-generate", "path": "x"}]', "a name must not end in tokenize, generate, detokenize"),
        (
            '[{"name": "a", "path": "x", "device": "mps"}]',
            "a: device: must be auto, cpu, cuda, or devices such as cuda:0,cuda:1",
        ),
        ('[{"name": "a", "path": "x", "max_sequences": 0}]', "a: max_sequences: Input should be greater"),
        ('[{"name": "a", "hf_repo": "../../x"}]', "a: hf_repo: String should match pattern"),
        ('[{"name": "a", "path": "x", "revision": "main"}]', "revision is for hf_repo"),
        ('[{"name": "a", "path": "x", "hf_file": "Q4_K_M"}]', "hf_file is for hf_repo"),
        ('[{"name": "a", "path": "x", "model": "org/x"}]', "a: model: Extra inputs are not permitted"),
        ('[{"name": "a", "model": "hf://x y"}]', "a: x y is not a model of the Hugging Face Hub"),
        ('[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]', "two entries are named a"),
        ('["a"]', "entry 1: Input should be"),
        ('{"model": []}', "must be a list of entries"),
        ("[{", "is not valid JSON"),
    ],
)
def test_an_error_names_the_file_and_the_entry(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "registry.json"
    file.write_text(content, encoding="utf-8")
    for action in (read_registry, lambda file: add_entry(file, make_entry(name="new", path="z"))):
        with pytest.raises(ServingError) as error:
            action(file)
        assert str(file) in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert file.read_text(encoding="utf-8") == content


def test_duplicate_and_unknown_names_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    add_entry(file, make_entry(name="lm", path="x"))
    with pytest.raises(ServingError, match=r"is in .* already"):
        add_entry(file, make_entry(name="lm", path="y"))
    with pytest.raises(ServingError, match=r"other is not in .*registered are: lm"):
        remove_entry(file, "other")


def test_an_entry_is_written_as_an_ensemble_and_its_parts(tmp_path: Path, checkpoint: Path) -> None:
    repository = tmp_path / "models"
    write_entry(
        Entry(name="mine", path=checkpoint, max_context_tokens=32, kv_cache_tokens=64, dtype="float32"),
        repository,
        model_repository(),
    )
    model = find_language_model("mine", [repository])
    assert model.generate == "mine-generate"
    assert model.sources == (checkpoint,)
    steps = [step.model_name for step in config_of(repository / "mine").ensemble_scheduling.step]
    assert steps == ["mine-tokenize", "mine-generate", "mine-detokenize"]
    parameters = config_of(repository / "mine-generate").parameters
    assert {name: parameters[name].string_value for name in parameters} == {
        "checkpoint": "../mine/1", "max_context_tokens": "32", "kv_cache_tokens": "64", "dtype": "float32"
    }  # fmt: skip
    shared = config_of(repository / "mine-tokenize").parameters
    assert shared["max_context_tokens"].string_value == "32"
    assert shared["kv_cache_tokens"].string_value == "64"
    assert (repository / "mine-generate" / "1").resolve() == model_repository().resolve() / "generate" / "1"
    remove_models("mine", repository)
    assert list(repository.iterdir()) == []
    assert checkpoint.is_dir()
    assert (model_repository() / "generate" / "1" / "model.py").is_file()


def test_a_copied_entry_contains_no_links(tmp_path: Path, checkpoint: Path) -> None:
    repository = tmp_path / "models"
    write_entry(Entry(name="mine", path=checkpoint), repository, model_repository(), copy=True)
    assert not [path for path in repository.rglob("*") if path.is_symlink()]
    assert (repository / "mine" / "1" / "model.safetensors").is_file()
    assert (repository / "mine-generate" / "1" / "engine" / "engine.py").is_file()


def test_all_parts_of_a_hub_entry_name_the_hub_repository(tmp_path: Path) -> None:
    write_entry(Entry(name="lm", hf_repo="org/lm", revision="v1"), tmp_path / "models", model_repository())
    for part in ("tokenize", "generate", "detokenize"):
        reference = config_of(tmp_path / "models" / f"lm-{part}").parameters["checkpoint"].string_value
        assert reference == "hf://org/lm@v1"
    assert find_language_model("lm", [tmp_path / "models"]).sources == (HubModel("org/lm", "v1"),)


@pytest.mark.parametrize(
    ("model", "fields", "reference"),
    [
        ("org/lm", {"hf_repo": "org/lm"}, "hf://org/lm"),
        ("org/lm@v1:Q4_K_M", {"hf_repo": "org/lm", "revision": "v1", "hf_file": "Q4_K_M"}, "hf://org/lm@v1:Q4_K_M"),
        ("q4.gguf", {"path": "q4.gguf"}, "FOLDER/q4.gguf"),
        ("runs/step_2920", {"path": "runs/step_2920"}, "../lm/1"),
    ],
)
def test_the_registrys_field_model_takes_any_model(
    tmp_path: Path, checkpoint: Path, model: str, fields: dict[str, str], reference: str
) -> None:
    """It is short for the fields of one kind, and all parts of the model name the same."""
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    for name, content in (("short", {"model": model}), ("long", fields)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"name": "lm", **content}]), encoding="utf-8")
    (entry,), (long,) = (read_registry(tmp_path / f"{name}.json") for name in ("short", "long"))
    assert entry == long == entry_of(parse(model, tmp_path), "lm")
    write_entry(entry, tmp_path / "models", model_repository())
    for part in ("tokenize", "generate", "detokenize"):
        parameters = config_of(tmp_path / "models" / f"lm-{part}").parameters
        assert parameters["checkpoint"].string_value == reference.replace("FOLDER", str(tmp_path))
    assert find_language_model("lm", [tmp_path / "models"]).sources == (entry.source,)


def test_a_gguf_file_whose_name_breaks_config_pbtxt_is_refused(tmp_path: Path) -> None:
    file = tmp_path / 'a"b.gguf'
    file.write_bytes(b"GGUF")
    with pytest.raises(ServingError, match="a quotation mark, a backslash or a line break; rename it"):
        write_entry(Entry(name="lm", path=file), tmp_path / "models", model_repository())


def test_a_synced_repository_holds_exactly_the_entries(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    one, two = Entry(name="one", path=checkpoint), Entry(name="two", path=checkpoint)
    folder = sync_repository("x", [one, two], model_repository())
    before = (folder / "two").stat().st_mtime_ns
    assert sync_repository("x", [two], model_repository()) == folder
    assert {path.name for path in folder.iterdir()} == {"two", "two-tokenize", "two-generate", "two-detokenize"}
    # An unchanged entry is not rewritten: Triton would take it for a new model.
    assert (folder / "two").stat().st_mtime_ns == before
    assert sync_repository("y", [two], model_repository()) != folder


def test_a_missing_checkpoint_does_not_affect_other_entries(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    entries = [Entry(name="gone", path=tmp_path / "nowhere"), Entry(name="here", path=checkpoint)]
    folder = sync_repository("x", entries, model_repository())
    preflight.check_language_models([find_language_model("here", [folder])])
    with pytest.raises(CheckpointError, match="does not exist"):
        preflight.check_language_models([find_language_model("gone", [folder])])


def test_models_loaded_at_start(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    monkeypatch.setattr("tritonlm.serving.paths.registry", lambda: tmp_path / "none.yaml")
    registry = tmp_path / "models.yaml"
    add_entry(registry, make_entry(name="lazy", path=checkpoint))

    def selected(**settings: Any) -> tuple[Sequence[str], str]:
        selection = select_models(Settings(**settings))
        return selection.load, selection.default

    assert selected() == (["abacus", "fable"], "")
    assert selected(registry=registry) == (["abacus", "fable"], "")
    assert selected(checkpoint=[str(checkpoint), f"later={checkpoint}"]) == (["step_2920", "later"], "step_2920")
    assert selected(registry=registry, load=["lazy"]) == (["lazy"], "")
    add_entry(registry, make_entry(name="eager", path=checkpoint, preload=True))
    assert selected(registry=registry) == (["eager"], "")
    assert selected(registry=registry, checkpoint=[str(checkpoint)])[0] == ["step_2920", "eager"]
    for duplicate in ("lazy", "abacus"):
        with pytest.raises(ServingError, match=f"two language models are named {duplicate}"):
            selected(registry=registry, checkpoint=[f"{duplicate}={checkpoint}"])
    with pytest.raises(ServingError, match="does not exist"):
        selected(registry=tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("DEFAULT_DEVICE", "cpu", "device", "cpu"),
        ("MAX_CONTEXT_TOKENS", "64", "max_context_tokens", 64),
        ("MODEL_REGISTRY_PATH", "/x/models.json", "registry", Path("/x/models.json")),
        ("ENABLE_EMBEDDINGS_BACKEND", "true", "enable_embeddings", True),
    ],
)
def test_an_older_systems_variables_are_read(
    variable: str, value: str, field: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert getattr(Settings(), field) == expected


def test_add_and_remove_edit_the_registry_and_report_errors(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    registry = tmp_path / "models.yaml"

    def tritonlm(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--registry", str(registry)])

    settings = ("--max-sequences", "4", "--kv-dtype", "int8")
    assert tritonlm("add", "mine", "--model", str(checkpoint), *settings).exit_code == 0
    (entry,) = read_registry(registry)
    assert entry == Entry(name="mine", path=checkpoint, max_sequences=4, kv_dtype="int8")
    assert entry.engine_parameters() == {"max_sequences": "4", "kv_dtype": "int8"}
    for words, message in (
        (("add", "mine", "--model", str(checkpoint)), "is in"),
        (("add", "an other", "--model", str(checkpoint)), "name: must be 1 to 100 letters, digits, dots, dashes and"),
        (("add", "other", "--model", str(tmp_path)), "has no config.json"),
        (("add", "other", "--model", "no/such/hub/id"), "there is no folder or GGUF file no/such/hub/id"),
        (("add", "other", "--model", str(checkpoint), "--revision", "v1"), "--revision is for a model of the Hub"),
        (("add", "other", "--model", str(checkpoint), "--dtype", "int3"), "dtype"),
        (("add", "other", "--model", str(checkpoint), "--kv-dtype", "bfloat16"), "kv_dtype"),
        (("add", "other", "--model", str(checkpoint), "--copy"), "--copy needs --repository"),
        (("remove", "other"), "registered are: mine"),
    ):
        result = tritonlm(*words)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    standalone = tmp_path / "standalone"
    assert tritonlm("add", "x", "--model", str(checkpoint), "--repository", str(standalone), "--copy").exit_code == 0
    assert (standalone / "x-generate" / "1" / "model.py").is_file()
    assert tritonlm("remove", "mine").exit_code == 0
    assert read_registry(registry) == []
