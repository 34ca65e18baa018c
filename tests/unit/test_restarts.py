"""Restart backoff, log rotation, and the supervisor's restarts of a process that dies or hangs."""

from __future__ import annotations

import contextlib
import http.server
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from tritonlm.serving import ServingError, Settings, supervisor
from tritonlm.serving import backoff as backoff_module
from tritonlm.serving import child as child_module
from tritonlm.serving.backoff import RestartBackoff
from tritonlm.serving.child import Child
from tritonlm.serving.control import TritonControl
from tritonlm.serving.repository import LanguageModel
from tritonlm.serving.restart_counts import RestartCounts, read_restart_counts


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(backoff_module, "time", fake)
    return fake


def test_the_first_restarts_are_immediate_and_later_delays_double(clock: Clock) -> None:
    backoff, delays = RestartBackoff(), []
    for _ in range(RestartBackoff.IMMEDIATE_ATTEMPTS + 4):
        delays.append(backoff.delay)
        clock.sleep(backoff.delay)
        backoff.record_attempt()
    assert delays == [0.0] * RestartBackoff.IMMEDIATE_ATTEMPTS + [1.0, 2.0, 4.0, 8.0]
    clock.sleep(16.0 + RestartBackoff.HEALTHY_SECONDS + 1)
    assert backoff.delay == 0.0, "a healthy period resets the backoff"


def test_the_delay_stays_at_its_maximum_after_any_number_of_attempts(clock: Clock) -> None:
    backoff = RestartBackoff()
    for _ in range(2000):
        clock.sleep(backoff.delay)
        backoff.record_attempt()
    assert backoff.delay == 30.0


def test_the_backoff_is_exhausted_after_too_many_attempts_in_a_row(clock: Clock) -> None:
    backoff = RestartBackoff()
    for _ in range(RestartBackoff.MAX_ATTEMPTS):
        assert not backoff.is_exhausted
        clock.sleep(backoff.delay)
        backoff.record_attempt()
    assert backoff.is_exhausted


def test_occasional_deaths_never_exhaust_the_backoff(clock: Clock) -> None:
    backoff = RestartBackoff()
    for _ in range(5 * RestartBackoff.MAX_ATTEMPTS):
        assert backoff.delay == 0.0
        backoff.record_attempt()
        clock.sleep(RestartBackoff.HEALTHY_SECONDS + 1)


def test_a_childs_log_is_rotated_while_it_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child_module, "MAX_LOG_BYTES", 1000)
    lines = "import time\nfor n in range(400):\n    print(f'line {n:03}', flush=True)\n    time.sleep(0.001)"
    with Child("the thing", [sys.executable, "-c", lines], {}, tmp_path / "the.log", 1.0) as child:
        while child.is_running():
            child.rotate_log()
    log, before = tmp_path / "the.log", tmp_path / "the.log.1"
    assert log.stat().st_size < 2000
    assert b"\0" not in log.read_bytes()
    assert (before.read_text() + log.read_text()).splitlines()[-1] == "line 399"


@pytest.mark.parametrize(("yields", "least"), [(False, 0), (True, 5)])
def test_a_child_that_yields_to_the_engine_has_a_low_priority_from_its_start(
    yields: bool, least: int, tmp_path: Path
) -> None:
    child = Child("the thing", [sys.executable, "-c", "import os; print(os.nice(0))"], {}, tmp_path / "log", 1.0)
    child.yields_to_engine = yields
    with child:
        assert child._process is not None
        child._process.wait(20)
    assert int((tmp_path / "log").read_text()) == max(os.nice(0), least)


def test_a_stopped_childs_own_children_are_gone(tmp_path: Path) -> None:
    # A process with much memory is not gone at once when it is killed.
    grandchild = "import time; memory = bytearray(b'1') * 2**28; print('ready', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", grandchild]
    script = f"import subprocess, time; print(subprocess.Popen({command!r}).pid, flush=True); time.sleep(60)"
    log = tmp_path / "log"
    with Child("the thing", [sys.executable, "-c", script], {}, log, 1.0) as child:
        deadline = time.monotonic() + 30
        while len(log.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        (started,) = psutil.Process(child.process_id).children()
    assert not started.is_running() or started.status() == psutil.STATUS_ZOMBIE


def test_a_child_that_always_dies_ends_the_service_with_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(RestartBackoff, "_delay_after", lambda *_: 0.0)
    command = [sys.executable, "-c", "print('a reason'); raise SystemExit(7)"]
    child = Child("the thing", command, {}, tmp_path / "log", 1.0)
    child.start()
    monitor = object.__new__(supervisor.Monitor)
    monitor._backoffs, monitor._restart_counts = {}, RestartCounts(tmp_path / "restarts.json")

    def restart_until_exhausted() -> None:
        while True:
            assert child._process is not None
            child._process.wait(20)
            monitor._restart(child, "ended")

    with pytest.raises(ServingError, match="exit code 7") as error:
        restart_until_exhausted()
    assert "a reason" in error.value.detail
    assert read_restart_counts(tmp_path / "restarts.json") == {"the thing": RestartBackoff.MAX_ATTEMPTS}
    assert (tmp_path / "log").read_text().count("a reason") == RestartBackoff.MAX_ATTEMPTS + 1


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_triton_that_dies_while_it_loads_is_restarted_up_to_three_times(tmp_path: Path, deaths: int) -> None:
    starts = tmp_path / "starts"
    # The process records each start, and stays alive after the given number of deaths.
    script = f"""
import pathlib, time
with pathlib.Path({str(starts)!r}).open("a+") as file:
    file.write("x"), file.flush(), file.seek(0)
    stays = len(file.read()) > {deaths}
time.sleep(60 if stays else 0)
raise SystemExit(7)
"""
    child: Any = Child("Triton", [sys.executable, "-c", script], {}, tmp_path / "log", 1.0)
    control: Any = SimpleNamespace(is_live=lambda: True)

    def load_all() -> str:
        while not (starts.exists() and len(starts.read_text()) > deaths):
            if not child.is_running():
                with supervisor.connection_errors_explained(child, "loading"):
                    raise httpx.ConnectError("connection refused")
            time.sleep(0.01)
        return "loaded"

    with contextlib.ExitStack() as stack:
        stack.callback(child.stop)
        if deaths < 3:
            assert supervisor.start(child, control, load_all) == "loaded"
        else:
            with pytest.raises(ServingError, match="exit code 7"):
                supervisor.start(child, control, load_all)
    assert len(starts.read_text()) == min(deaths + 1, 3)


def test_a_live_triton_that_does_not_load_is_restarted(tmp_path: Path) -> None:
    """A Triton that is about to abort may still report that it is live."""
    child: Any = Child("Triton", [sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", 1.0)
    control: Any = SimpleNamespace(is_live=lambda: True)
    processes: list[int] = []

    def load_all() -> str:
        processes.append(child.process_id)
        if len(processes) == 1:
            with supervisor.connection_errors_explained(child, "loading"):
                raise httpx.ReadTimeout("timed out")
        return "loaded"

    with contextlib.ExitStack() as stack:
        stack.callback(child.stop)
        assert supervisor.start(child, control, load_all) == "loaded"
    assert len(set(processes)) == 2


@pytest.mark.parametrize("timeouts", [1, 4, 5])
def test_polling_a_load_tolerates_a_few_timeouts(timeouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonlm.serving.control._CALL_SECONDS", 0.2)
    paths: list[str] = []

    class Triton(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            if len(paths) <= 1 + timeouts:
                time.sleep(0.5)
            body = b'[{"name": "tiny", "state": "READY"}]'
            with contextlib.suppress(ConnectionError):
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Triton) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with TritonControl("127.0.0.1", server.server_address[1]) as control, contextlib.ExitStack() as stack:
            stack.callback(server.shutdown)
            if timeouts == 5:
                stack.enter_context(pytest.raises(httpx.ReadTimeout))
            control.load("tiny", lambda: None)
    assert paths == ["/v2/repository/models/tiny/load", *["/v2/repository/index"] * min(timeouts + 1, 5)]


def test_a_failed_load_in_a_healthy_triton_is_not_retried(tmp_path: Path) -> None:
    child: Any = Child("Triton", [sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", 1.0)
    control: Any = SimpleNamespace(is_live=lambda: True)
    attempts = []

    def load_all() -> None:
        attempts.append(1)
        raise ServingError("tiny does not load: no tokenizer")

    with contextlib.ExitStack() as stack:
        stack.callback(child.stop)
        with pytest.raises(ServingError, match="no tokenizer"):
            supervisor.start(child, control, load_all)
    assert len(attempts) == 1


class LocalTriton:
    """A process that has died; `each_look` is called whenever the monitor has looked at everything."""

    name, process_id, log = "Triton", os.getpid(), None

    def __init__(self, each_look: Callable[[], None]) -> None:
        self.running, self.restarts, self.rotate_log = False, 0, each_look

    def is_running(self) -> bool:
        return self.running

    def restart(self) -> None:
        self.running, self.restarts = True, self.restarts + 1

    def crash_error(self) -> ServingError:
        return ServingError("Triton ended")


class LoadingControl:
    """Loads models; those of `failing` as often as it says do not load."""

    def __init__(self, failing: dict[str, int]) -> None:
        self.failing, self.attempts, self.loaded = failing, Counter[str](), set[str]()

    def is_live(self) -> bool:
        return True

    def can_generate(self, model: str) -> bool:
        return True

    def command(self, *_: object) -> dict[str, object]:
        return {}

    def loaded_parts(self) -> list[str]:
        return []

    def begin_load(self, model: str) -> bool:
        self.attempts[model] += 1
        if self.attempts[model] > self.failing.get(model, 0):
            self.loaded.add(model)
        return model in self.loaded

    def is_loaded(self, model: str) -> bool:
        if model not in self.loaded:
            raise ServingError(f"{model} does not load: no memory")
        return True

    def load(self, model: str, check: Callable[[], None]) -> None:
        self.begin_load(model)
        self.is_loaded(model)


MODELS = ["first", "second", "third"]


def monitor(triton: Any, control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the monitor of a Triton with MODELS until it is stopped."""
    monkeypatch.setattr(supervisor, "_MONITOR_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path)
    models = [LanguageModel(name, f"{name}-generate", ()) for name in MODELS]
    with contextlib.suppress(supervisor.StopRequested):
        supervisor.Monitor(Settings(), models, triton, control, None).run()


def test_a_model_that_does_not_load_after_a_restart_leaves_the_others_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, loaded = LoadingControl({"first": 3}), []

    def each_look() -> None:
        loaded.append(set(control.loaded))
        if len(loaded) == 20:
            raise supervisor.StopRequested

    triton = LocalTriton(each_look)
    monitor(triton, control, tmp_path, monkeypatch)
    assert {"second", "third"} <= loaded[0]
    assert loaded[-1] == set(MODELS)
    assert (triton.restarts, control.attempts) == (1, {"first": 4, "second": 1, "third": 1})


def test_a_model_that_never_loads_is_given_up(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    control, end = LoadingControl({"second": 10_000}), clock.now + 500

    def each_look() -> None:
        clock.sleep(1.0)
        if clock.now >= end:
            raise supervisor.StopRequested

    monitor(LocalTriton(each_look), control, tmp_path, monkeypatch)
    assert control.attempts["second"] == 1 + RestartBackoff.MAX_ATTEMPTS
    assert capsys.readouterr().err.count("second does not load and is not tried again; tritonlm load second") == 1


@pytest.mark.parametrize("ends", [True, False])
def test_a_triton_that_breaks_while_it_loads_again_is_asked_for_no_further_model(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has ended is restarted. One that recovers loads its models, as after a failed load."""
    loads: list[str] = []
    looks = Counter[str]()

    class Control(LoadingControl):
        def load(self, model: str, check: Callable[[], None]) -> None:
            loads.append(model)
            if len(loads) == 1:
                triton.running = not ends
                raise httpx.ReadError("connection lost")
            super().load(model, check)

        def is_loaded(self, model: str) -> bool:
            if not triton.running:
                raise httpx.ConnectError("connection refused")
            return super().is_loaded(model)

    def each_look() -> None:
        looks["all"] += 1
        if looks["all"] == 20:
            raise supervisor.StopRequested

    control, triton = Control({}), LocalTriton(each_look)
    monitor(triton, control, tmp_path, monkeypatch)
    assert (triton.restarts, loads) == ((2, ["first", *MODELS]) if ends else (1, ["first"]))
    assert control.attempts == dict.fromkeys(MODELS, 1)
