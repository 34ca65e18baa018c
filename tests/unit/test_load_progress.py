"""Progress of a load as a file, and the priority at which weights are loaded."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine.monitoring.step_journal import journal_file, open_journals
from engine.runners.loading import in_load_thread, load_at_low_priority
from tritonlm.contract.load_progress import Loaded, LoadProgress, load_file, read_progress
from tritonlm.serving import ServingError, supervisor, terminal


def test_progress_is_read_while_a_load_runs(tmp_path: Path) -> None:
    file = tmp_path / "progress"
    assert read_progress(file) is None
    progress = LoadProgress(100, file)
    assert read_progress(file) == Loaded(0, 100)
    progress.add(60)
    assert read_progress(file) == Loaded(60, 100)
    progress.add(60)
    assert read_progress(file) == Loaded(100, 100)
    progress.close()
    assert read_progress(file) is None


def test_a_foreign_or_short_file_is_no_progress(tmp_path: Path) -> None:
    short, link = tmp_path / "short", tmp_path / "link"
    short.write_bytes(b"12")
    link.symlink_to(short)
    assert read_progress(short) is None
    assert read_progress(link) is None
    # Nor does a writer follow a link.
    LoadProgress(5, link)
    assert short.read_bytes() == b"12"


def test_files_of_ended_tritons_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, own = load_file(ended.pid, "a"), load_file(os.getpid(), "a")
    for file in (stale, own):
        LoadProgress(1, file)
    load_file(os.getpid(), "b")
    assert (stale.exists(), own.exists()) == (False, True)


def test_a_load_runs_at_low_priority_and_its_caller_does_not() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    inside = load_at_low_priority(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert inside > before
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_the_first_model_of_a_triton_is_loaded_at_the_usual_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def niceness() -> int:
        return in_load_thread(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    usual = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert niceness() == usual
    journals = open_journals(journal_file("other-generate", "weights"))
    assert niceness() > usual
    # Its successor finds the journal of a process that has died.
    del journals
    assert niceness() > usual


def test_an_error_of_a_load_reaches_its_caller() -> None:
    with pytest.raises(ValueError, match="broken"):
        load_at_low_priority(lambda: int("broken"))


class Clock:
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class SlowControl:
    """Triton's control API, with a load that reports its progress, or none, before it is done."""

    def __init__(self, file: Path, clock: Clock, steps: int, moves: bool) -> None:
        self._file, self._clock, self._steps, self._moves = file, clock, steps, moves

    def load(self, _model: str, check: Callable[[], None]) -> None:
        progress = LoadProgress(8_000_000, self._file)
        for _ in range(self._steps):
            progress.add(2_000_000 if self._moves else 0)
            self._clock.seconds += 1
            check()
        progress.close()

    def can_generate(self, _model: str) -> bool:
        return True

    def command(self, *_: object) -> dict[str, Any]:
        return {"running": 0}


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(terminal, "_UPDATE_SECONDS", 0.0)
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    model = SimpleNamespace(name="lm", generate="lm-generate")
    triton = SimpleNamespace(process_id=os.getpid(), is_running=lambda: True, log=None)

    def load(**control: Any) -> dict[str, Any]:
        fake = SlowControl(load_file(os.getpid(), model.generate), clock, **control)
        # Four steps take longer than this limit together; a single one does not.
        return supervisor.load(model, triton, fake, seconds=2.5)  # type: ignore[arg-type]

    return load


def test_a_load_shows_its_bytes_and_may_be_slow(
    loading: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert loading(steps=4, moves=True) == {"running": 0}
    output = capsys.readouterr().err
    assert "loading lm: 2 of 8 MB …" in output
    assert "loading lm: 8 of 8 MB …" in output


def test_a_load_without_progress_fails_with_the_remedy(loading: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ServingError, match="allow more with --load-seconds"):
        loading(steps=50, moves=False)
