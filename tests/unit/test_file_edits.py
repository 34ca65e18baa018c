"""Edits of files that several processes share."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tritonlm.contract import CheckpointError, file_edits


def test_a_lock_that_another_one_holds_is_waited_for_with_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_edits, "LOCK_SECONDS", 0.0)
    file = tmp_path / "models.yaml"
    with (
        file_edits.locked(file),
        pytest.raises(CheckpointError, match=r"another process has been editing .*models\.yaml.*try again"),
        file_edits.locked(file),
    ):
        pass
    with file_edits.locked(file):
        file_edits.replace_text(file, "[]")
    assert file.read_text() == "[]"


def test_a_file_keeps_its_mode_unless_another_is_named(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    modes = []
    for mode in (None, 0o600, None, 0o640):
        file_edits.replace_text(file, "[]", mode)
        modes.append(stat.S_IMODE(file.stat().st_mode))
    assert modes == [0o644, 0o600, 0o600, 0o640]
