"""Which language models a server has, and what is written for them before it starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from fakes.checkpoints import write_checkpoint
from tritonlm.checkpoints.reference import HubModel
from tritonlm.cli import app
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter
from tritonlm.serving import ServingError, Settings
from tritonlm.serving.model_selection import language_models, select_models, write_models
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    monkeypatch.setattr("tritonlm.serving.paths.registry", lambda: tmp_path / "none.yaml")
    monkeypatch.setattr("tritonlm.serving.paths.adapters", lambda: tmp_path / "adapters")
    return tmp_path / "cache"


def checkpoint(folder: Path) -> Path:
    """A checkpoint of which all but the weights can be read."""
    (write_checkpoint(folder) / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def repository(model: str) -> Path:
    settings = Settings(checkpoint=[model])
    return write_models(settings, select_models(settings))[-1]


def test_the_same_option_in_two_working_folders_means_two_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the second server replaces the models of the first one's Triton."""
    repositories = []
    for folder in ("a", "b"):
        checkpoint(tmp_path / folder / "run")
        monkeypatch.chdir(tmp_path / folder)
        repositories.append(repository("run"))
    first, second = repositories
    assert first != second
    assert [(folder / "run" / "1").resolve() for folder in (first, second)] == [
        tmp_path / "a" / "run", tmp_path / "b" / "run"
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert repository("b/run") == second


def test_a_model_is_served_under_a_valid_name_or_the_remedy_is_named(tmp_path: Path) -> None:
    (tmp_path / "my model (1).gguf").write_bytes(b"GGUF")
    selection = select_models(Settings(checkpoint=[str(tmp_path / "my model (1).gguf")]))
    assert dict(selection.named) == {"my-model-1": tmp_path / "my model (1).gguf"}
    (tmp_path / "模型").mkdir()
    with pytest.raises(ServingError, match="without letters and digits of ASCII; name it as NAME=MODEL"):
        select_models(Settings(checkpoint=[str(tmp_path / "模型")]))


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """The adapters file of an LM whose adapter a running server declares, that of the default ports."""
    add_adapter(tmp_path / "adapters" / "lm.json", "pirate", AdapterEntry("/pirate", declared_by="serve 8000"))
    return tmp_path / "adapters" / "lm.json"


def test_selecting_models_writes_and_downloads_nothing(tmp_path: Path, cache: Path, declared: Path) -> None:
    before = declared.read_text()
    settings = Settings(checkpoint=[str(checkpoint(tmp_path / "lm")), "far=org/far"], adapter=["a=/none"])
    selection = select_models(settings)
    assert (selection.load, selection.default) == (["lm", "far"], "lm")
    assert [model.sources for model in language_models(settings, selection)] == [
        (tmp_path / "lm",), (HubModel("org/far"),)
    ]  # fmt: skip
    assert declared.read_text() == before
    assert not cache.exists()


def test_doctor_leaves_the_files_of_a_running_server_alone(
    tmp_path: Path, cache: Path, declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = declared.read_text()
    monkeypatch.setenv("TRITONLM_CHECKPOINT", f"{checkpoint(tmp_path / 'lm')},org/far:Q4_K_M")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    (finding,) = [row for row in json.loads(result.stdout) if row["check"] == "checkpoints"]
    assert finding["ok"], finding
    assert finding["finding"] == "lm, far-Q4_K_M (org/far:Q4_K_M of the Hub is checked when it is served)"
    assert declared.read_text() == before
    assert not (cache / "repositories").exists()


def test_a_server_whose_ports_are_in_use_leaves_the_files_of_the_other_one_alone(
    tmp_path: Path, cache: Path, declared: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        add_adapter(declared, "bard", AdapterEntry("/bard", declared_by=f"serve {port}"))
        before = declared.read_text()
        words = ["serve", str(checkpoint(tmp_path / "lm")), "--no-gateway", "--triton-host", "127.0.0.1"]
        result = CliRunner().invoke(app, [*words, "--http-port", str(port)])
    assert result.exit_code == 1
    assert f"port {port} (HTTP) on 127.0.0.1 is in use" in result.stderr
    assert declared.read_text() == before
    assert not (cache / "repositories").exists()
