"""The watchdog restarts processes that hang, and not those that are slow but make progress."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tritonlm.serving import ServingError
from tritonlm.serving import watchdog as watchdog_module
from tritonlm.serving.control import PingResult
from tritonlm.serving.restart_counts import RestartCounts
from tritonlm.serving.watchdog import Watchdog

PART = "generate"
SLEEPS = "import time\nprint(flush=True)\ntime.sleep(60)"
# For half of the time: other tests run beside it.
COMPUTES = """
import time
print(flush=True)
end = time.time() + 60
while time.time() < end:
    begun = time.process_time()
    while time.process_time() < begun + 0.01:
        pass
    time.sleep(0.01)
"""


class Control:
    """A fake Triton with one part and a fixed ping result; a ping without a reply takes its whole timeout."""

    def __init__(self, result: PingResult) -> None:
        self.result = result
        self.restarted = False

    def loaded_parts(self) -> list[str]:
        return [PART]

    def ping(self, part: str, seconds: float) -> PingResult:
        assert part == PART
        if not self.result.replied:
            time.sleep(seconds)
        return self.result

    def unload(self, part: str) -> None:
        self.restarted = True

    def begin_load(self, part: str) -> bool:
        return True


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[psutil.Process]:
    child = subprocess.Popen([sys.executable, "-c", request.param], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    yield psutil.Process(child.pid)
    child.kill()
    child.wait()
    child.stdout.close()


def seconds_until_restart(
    process: psutil.Process, result: PingResult, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> float | None:
    """Seconds until the watchdog restarts the part; None when it does not within the time."""
    monkeypatch.setattr(watchdog_module, "_processes_of", lambda triton: {PART: process})
    control: Any = Control(result)
    counts, started = RestartCounts(tmp_path / "restarts.json"), time.monotonic()
    watchdog = Watchdog(control, 60.0, counts)
    while time.monotonic() - started < seconds:
        watchdog.check(process.pid)
        if control.restarted:
            return time.monotonic() - started
        time.sleep(0.1)
    return None


@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_a_part_that_replies_is_not_restarted(process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_until_restart(process, PingResult(replied=True), 1.5, tmp_path, monkeypatch) is None


@pytest.mark.slow
@pytest.mark.parametrize("result", [PingResult(replied=False), PingResult(replied=True, stalled_seconds=10.0)])
@pytest.mark.parametrize("process", [COMPUTES], indirect=True)
def test_a_part_that_uses_the_processor_is_slow_not_hung(
    process: Any,
    result: PingResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert seconds_until_restart(process, result, 6.0, tmp_path, monkeypatch) is None
    output = "".join(capsys.readouterr())
    assert output.count("is slow") == 1, "logged once"


@pytest.mark.parametrize("process", [COMPUTES], indirect=True)
def test_a_part_that_spins_forever_is_restarted(process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_SLOW_SECONDS", 4.0)
    assert seconds_until_restart(process, PingResult(replied=False), 8.0, tmp_path, monkeypatch) is not None


@pytest.mark.parametrize("result", [PingResult(replied=False), PingResult(replied=True, stalled_seconds=4.0)])
@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_a_part_without_progress_is_restarted(
    process: Any, result: PingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seconds_until_restart(process, result, 10.0, tmp_path, monkeypatch) is not None


@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_a_stopped_process_is_restarted_at_the_first_failed_ping(
    process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 5.0
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.setattr(watchdog_module, "_HANG_PINGS", 1000)
    assert seconds_until_restart(process, PingResult(replied=False), 10.0, tmp_path, monkeypatch) is not None


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError])
def test_a_triton_that_dies_during_a_retried_load_is_left_to_the_supervisor(
    error: type[httpx.TransportError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DyingTriton(Control):
        loads = 0

        def loaded_parts(self) -> list[str]:
            return [] if self.restarted else [PART]

        def is_loaded(self, part: str) -> bool:
            raise ServingError(f"{part} does not load")

        def begin_load(self, part: str) -> bool:
            self.loads += 1
            if self.loads > 1:
                raise error("Triton is gone")
            return False

    monkeypatch.setattr(watchdog_module, "_processes_of", lambda triton: {})
    control: Any = DyingTriton(PingResult(replied=True))
    watchdog = Watchdog(control, 60.0, RestartCounts(tmp_path / "restarts.json"))
    for _ in range(3):
        watchdog.check(0)
    assert control.loads == 3, "the restart, and a retry at each check"
