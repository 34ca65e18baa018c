"""A test run that is interrupted or killed, or whose worker is, leaves no process and no shared memory behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import process_owner
import psutil
import pytest

TESTS = Path(process_owner.__file__).parent
GRACE_SECONDS, WAIT_SECONDS = 0.2, 120.0
# The first run of the test writes the ids of its process and of a child, which ignores SIGTERM, and hangs. A worker
# that replaces a killed one finds the file.
STUBBORN = """
import os, pathlib, subprocess, sys, time

def test_waits():
    if os.path.exists("processes"):
        return
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    pathlib.Path(f"/dev/shm/tritonlm-{os.getpid()}-stubborn").touch()
    pathlib.Path("written").write_text(f"{os.getpid()} {process.pid}")
    os.rename("written", "processes")
    time.sleep(600)
"""
CONFTEST = f"""
import process_owner

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        process_owner.own_processes({GRACE_SECONDS})
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "ended", "ending"),
    [
        ("0", "run", signal.SIGINT), ("0", "run", signal.SIGTERM), ("0", "run", signal.SIGKILL),
        ("1", "run", signal.SIGINT), ("1", "run", signal.SIGKILL), ("1", "worker", signal.SIGKILL),
    ],
)  # fmt: skip
def test_an_ended_run_leaves_nothing(tmp_path: Path, workers: str, ended: str, ending: signal.Signals) -> None:
    (tmp_path / "test_stubborn.py").write_text(STUBBORN, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=."]
    command += ["-p", "xdist.plugin", "-n", workers]
    # Other plugins take seconds to import.
    environment = {"PYTHONPATH": str(TESTS), "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as run:
        try:
            written = tmp_path / "processes"
            wait_until(lambda: written.exists() or run.poll() is not None)
            tester, child = (psutil.Process(int(number)) for number in written.read_text().split())
            region = Path(f"/dev/shm/tritonlm-{tester.pid}-stubborn")
            assert region.exists()
            if ended == "worker":
                tester.send_signal(ending)
            else:
                run.send_signal(ending)
            run.wait(WAIT_SECONDS)
        finally:
            run.kill()
    # The child ignores SIGTERM and belongs to the ended run: the cleaner has to kill it.
    child.wait(WAIT_SECONDS)
    wait_until(lambda: not region.exists())
