"""A test run that is interrupted or killed leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import process_owner
import psutil
import pytest

TESTS = Path(process_owner.__file__).parent
GRACE_SECONDS, WAIT_SECONDS = 0.2, 60.0
STUBBORN = """
import subprocess, sys, time

def test_waits():
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    with open("child", "w") as file:
        file.write(str(process.pid))
    time.sleep(600)
"""
CONFTEST = f"""
import process_owner

def pytest_configure(config):
    process_owner.own_processes({GRACE_SECONDS})
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_run_leaves_no_process(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "test_stubborn.py").write_text(STUBBORN, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=."]
    with subprocess.Popen(
        command, cwd=tmp_path, env={"PYTHONPATH": str(TESTS), "PATH": ""}, stdout=subprocess.DEVNULL
    ) as run:
        written = tmp_path / "child"
        while not (written.exists() and written.read_text()):
            assert run.poll() is None
            time.sleep(0.02)
        child = psutil.Process(int(written.read_text()))
        run.send_signal(ending)
        run.wait(WAIT_SECONDS)
    # The child ignores SIGTERM and belongs to the ended run: the cleaner has to kill it.
    child.wait(WAIT_SECONDS)
