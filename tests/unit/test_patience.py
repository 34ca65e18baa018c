"""What keeps dying is tried again more and more slowly, and in the end given up with a word."""

from __future__ import annotations

import contextlib
import http.server
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tritonlm.serving import ServingError, supervisor
from tritonlm.serving import backoff as patience
from tritonlm.serving import child as child_module
from tritonlm.serving.backoff import Patience
from tritonlm.serving.child import Child
from tritonlm.serving.control import TritonControl
from tritonlm.serving.repairs import Repairs, read_repairs


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(patience, "time", made)
    return made


def test_a_few_tries_are_free_and_then_each_waits_twice_as_long(clock: Clock) -> None:
    tries, pauses = Patience(), []
    for _ in range(Patience.FREE + 4):
        pauses.append(tries.pause)
        clock.sleep(tries.pause)
        tries.note()
    assert pauses == [0.0] * Patience.FREE + [1.0, 2.0, 4.0, 8.0]
    clock.sleep(16.0 + Patience.LIVED_SECONDS + 1)
    assert tries.pause == 0.0, "what has lived for a while is new"


def test_it_is_over_after_too_many_in_a_row(clock: Clock) -> None:
    tries = Patience()
    for _ in range(Patience.MOST):
        assert not tries.is_over
        clock.sleep(tries.pause)
        tries.note()
    assert tries.is_over


def test_what_dies_now_and_then_is_brought_back_for_ever(clock: Clock) -> None:
    tries = Patience()
    for _ in range(5 * Patience.MOST):
        assert tries.pause == 0.0
        tries.note()
        clock.sleep(Patience.LIVED_SECONDS + 1)


def test_a_childs_log_stays_short_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child_module, "LONGEST_LOG", 1000)
    lines = "import time\nfor n in range(400):\n    print(f'line {n:03}', flush=True)\n    time.sleep(0.001)"
    with Child("the thing", [sys.executable, "-c", lines], {}, tmp_path / "the.log", 1.0) as child:
        while child.is_running():
            child.keep_log_short()
    log, before = tmp_path / "the.log", tmp_path / "the.log.1"
    assert log.stat().st_size < 2000
    assert b"\0" not in log.read_bytes()
    assert (before.read_text() + log.read_text()).splitlines()[-1] == "line 399"


def test_a_child_that_always_dies_ends_the_service_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Patience, "_pause_after", lambda *_: 0.0)
    command = [sys.executable, "-c", "print('a reason'); raise SystemExit(7)"]
    child = Child("the thing", command, {}, tmp_path / "log", 1.0)
    child.start()
    watch = object.__new__(supervisor.Watch)
    watch._patience, watch._repairs = {}, Repairs(tmp_path / "repairs.json")

    def until_it_is_given_up() -> None:
        while True:
            assert child._process is not None
            child._process.wait(20)
            watch._restart(child, "ended")

    with pytest.raises(ServingError, match="exit code 7") as told:
        until_it_is_given_up()
    assert "a reason" in told.value.detail
    assert read_repairs(tmp_path / "repairs.json") == {"the thing": Patience.MOST}
    assert (tmp_path / "log").read_text().count("a reason") == Patience.MOST + 1


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_what_dies_while_it_loads_is_started_again_a_few_times(tmp_path: Path, deaths: int) -> None:
    starts = tmp_path / "starts"
    # It notes each start, and lives from a certain one on.
    script = f"""
import pathlib, time
with pathlib.Path({str(starts)!r}).open("a+") as file:
    file.write("x"), file.flush(), file.seek(0)
    lives = len(file.read()) > {deaths}
time.sleep(60 if lives else 0)
raise SystemExit(7)
"""
    child: Any = Child("Triton", [sys.executable, "-c", script], {}, tmp_path / "log", 1.0)
    control: Any = SimpleNamespace(is_live=lambda: True)

    def load_all() -> str:
        while not (starts.exists() and len(starts.read_text()) > deaths):
            if not child.is_running():
                with supervisor.reached(child, "loading"):
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


def test_a_triton_that_only_says_that_it_is_live_is_started_again(tmp_path: Path) -> None:
    """As one does that is about to abort."""
    child: Any = Child("Triton", [sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", 1.0)
    control: Any = SimpleNamespace(is_live=lambda: True)
    processes: list[int] = []

    def load_all() -> str:
        processes.append(child.process_id)
        if len(processes) == 1:
            with supervisor.reached(child, "loading"):
                raise httpx.ReadTimeout("timed out")
        return "loaded"

    with contextlib.ExitStack() as stack:
        stack.callback(child.stop)
        assert supervisor.start(child, control, load_all) == "loaded"
    assert len(set(processes)) == 2


@pytest.mark.parametrize("silent_looks", [1, 4, 5])
def test_a_triton_that_is_slow_to_tell_of_a_load_is_asked_again(
    silent_looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonlm.serving.control._PATIENCE_SECONDS", 0.2)
    asked: list[str] = []

    class Triton(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            if len(asked) <= 1 + silent_looks:
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
            if silent_looks == 5:
                stack.enter_context(pytest.raises(httpx.ReadTimeout))
            control.load("tiny", lambda: None)
    assert asked == ["/v2/repository/models/tiny/load", *["/v2/repository/index"] * min(silent_looks + 1, 5)]


def test_what_fails_to_load_in_a_living_triton_is_told_at_once(tmp_path: Path) -> None:
    child: Any = Child("Triton", [sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", 1.0)
    control: Any = SimpleNamespace(is_live=lambda: True)
    tries = []

    def load_all() -> None:
        tries.append(1)
        raise ServingError("tiny does not load: no tokenizer")

    with contextlib.ExitStack() as stack:
        stack.callback(child.stop)
        with pytest.raises(ServingError, match="no tokenizer"):
            supervisor.start(child, control, load_all)
    assert len(tries) == 1
