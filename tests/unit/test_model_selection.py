"""Which language models a server has, and what is written for them before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.checkpoints import write_checkpoint
from tritonlm.serving import Settings
from tritonlm.serving.model_selection import select_models


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


def test_the_same_option_in_two_working_folders_means_two_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the second server replaces the models of the first one's Triton."""
    repositories = []
    for folder in ("a", "b"):
        checkpoint(tmp_path / folder / "run")
        monkeypatch.chdir(tmp_path / folder)
        repositories.append(select_models(Settings(checkpoint=["run"])).repositories[-1])
    first, second = repositories
    assert first != second
    assert [(folder / "run" / "1").resolve() for folder in (first, second)] == [
        tmp_path / "a" / "run", tmp_path / "b" / "run"
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert select_models(Settings(checkpoint=["b/run"])).repositories[-1] == second
