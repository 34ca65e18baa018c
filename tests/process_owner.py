"""Ends the processes that a test run leaves behind when it finishes, is interrupted or is killed, and removes the
shared memory of Tritons whose supervisor was killed.

A run marks its environment, and every process that it starts inherits the mark. A cleaner process waits on a pipe that
only the run holds open. When the pipe closes, the cleaner ends the marked processes that still run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil

MARK = "TRITONLM_TEST_RUN"
# The wait before the processes are terminated, and again before they are killed.
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_SHARED_MEMORY = Path("/dev/shm")


def own_processes(grace_seconds: float = GRACE_SECONDS) -> None:
    """Mark this process and what it starts from now on, and start the cleaner."""
    run = f"{os.getpid()}-{secrets.token_hex(8)}"
    cleaner_environment = {name: value for name, value in os.environ.items() if name != MARK}
    os.environ[MARK] = run
    # Only this process holds the write end, until it ends: child processes do not inherit it.
    read_end, _ = os.pipe()
    subprocess.Popen(
        [sys.executable, __file__, run, str(grace_seconds), str(time.time())],
        stdin=read_end,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=cleaner_environment,
        start_new_session=True,
    )
    os.close(read_end)


def marked(run: str) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == run:
                processes.append(process)
    return processes


def end(run: str, grace_seconds: float) -> None:
    """Wait for the run's processes to end, then terminate, then kill them."""
    for step in (None, psutil.Process.terminate, psutil.Process.kill):
        for process in marked(run) if step else ():
            with contextlib.suppress(psutil.Error):
                step(process)
        deadline = time.monotonic() + grace_seconds
        while marked(run) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def remove_shared_memory(since: float) -> None:
    """Remove the regions of ended Tritons, written since this time. A name holds the supervisor's id: tritonlm-ID-…."""
    for region in _SHARED_MEMORY.glob("tritonlm-*-*"):
        with contextlib.suppress(FileNotFoundError):
            if region.stat().st_mtime >= since and not runs(region.name.split("-")[1]):
                region.unlink()


def runs(process_id: str) -> bool:
    try:
        return psutil.Process(int(process_id)).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(sys.argv[1], float(sys.argv[2]))
    remove_shared_memory(float(sys.argv[3]))
