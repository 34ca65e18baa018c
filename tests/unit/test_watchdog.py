"""Slow is not hung: a process that makes progress is left alone; one that stands still is found within five seconds."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tritonlm.serving import watchdog as room
from tritonlm.serving.control import Sign
from tritonlm.serving.repairs import Repairs
from tritonlm.serving.watchdog import Watchdog

PART = "generate"
SLEEPS = "import time\nprint(flush=True)\ntime.sleep(60)"
COMPUTES = "import time\nprint(flush=True)\nend = time.time() + 60\nwhile time.time() < end: pass"


class Control:
    """A Triton whose one part gives the signs that a test wants; who does not answer takes as long as one waits."""

    def __init__(self, sign: Sign) -> None:
        self.sign = sign
        self.repaired = False

    def loaded_parts(self) -> list[str]:
        return [PART]

    def ping(self, part: str, seconds: float) -> Sign:
        assert part == PART
        if not self.sign.answered:
            time.sleep(seconds)
        return self.sign

    def unload(self, part: str) -> None:
        self.repaired = True

    def begin_load(self, part: str) -> bool:
        return True


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[psutil.Process]:
    started = subprocess.Popen([sys.executable, "-c", request.param], stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()
    yield psutil.Process(started.pid)
    started.kill()
    started.wait()
    started.stdout.close()


def repaired_after(
    process: psutil.Process, sign: Sign, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> float | None:
    """When the watch has the process started again; None where it leaves it alone for so long."""
    monkeypatch.setattr(room, "_processes_of", lambda triton: {PART: process})
    control: Any = Control(sign)
    watch, began = Watchdog(control, 60.0, Repairs(tmp_path / "repairs.json")), time.monotonic()
    while time.monotonic() - began < seconds:
        watch.look(process.pid)
        if control.repaired:
            return time.monotonic() - began
        time.sleep(0.1)
    return None


@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_one_that_answers_is_left_alone(process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repaired_after(process, Sign(answered=True), 1.5, tmp_path, monkeypatch) is None


@pytest.mark.parametrize("sign", [Sign(answered=False), Sign(answered=True, still_seconds=10.0)])
@pytest.mark.parametrize("process", [COMPUTES], indirect=True)
def test_one_that_computes_is_slow_whatever_its_signs(
    process: Any, sign: Sign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repaired_after(process, sign, 6.0, tmp_path, monkeypatch) is None
    shown = "".join(capsys.readouterr())
    assert shown.count("is slow") == 1, "it is said once"


@pytest.mark.parametrize("process", [COMPUTES], indirect=True)
def test_one_that_spins_for_ever_is_started_again(
    process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SLOW_SECONDS", 4.0)
    assert repaired_after(process, Sign(answered=False), 8.0, tmp_path, monkeypatch) is not None


@pytest.mark.parametrize("sign", [Sign(answered=False), Sign(answered=True, still_seconds=4.0)])
@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_one_that_stands_still_is_found(
    process: Any, sign: Sign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert repaired_after(process, sign, 10.0, tmp_path, monkeypatch) is not None


@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_one_that_is_stopped_is_found_at_the_first_look(
    process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.send_signal(signal.SIGSTOP)
    waiting = time.monotonic() + 5.0
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < waiting:
        time.sleep(0.01)
    monkeypatch.setattr(room, "_HANGING_LOOKS", 1000)
    assert repaired_after(process, Sign(answered=False), 10.0, tmp_path, monkeypatch) is not None
