"""A child process that is started, restarted and stopped, and never outlives the supervisor.

It does not know what program runs in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from tritonlm.contract.priority import lower_thread_priority

from .errors import ServingError

_PR_SET_PDEATHSIG = 1
_LOG_LINES_SHOWN = 12
MAX_LOG_BYTES = 64 * 2**20
# For killed processes to be gone: the memory of a large engine is freed before that.
_GONE_SECONDS, _POLL_SECONDS = 10.0, 0.005


class Child:
    """A context manager: the process runs inside it, and its whole process group is gone after it."""

    # Whether its imports, too, leave the cores to the engine's process, which starts beside it and takes longer.
    yields_to_engine = False

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        exit_seconds: float,
    ) -> None:
        """Without a log file the output goes to this process's stderr."""
        # File descriptors that the process inherits.
        self.inherited_fds: Sequence[int] = ()
        self.name, self.command, self.environment = name, list(command), dict(environment)
        self.log, self.exit_seconds = log, exit_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process_id(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def restart(self) -> None:
        """Start the process again, killing it first where it still runs; append to the same log."""
        if self._process is not None:
            # A hanging process does not react to SIGTERM.
            self._end_group()
        self._end()
        self._process = None
        self.start(again=True)

    def start(self, again: bool = False) -> None:
        assert self._process is None, f"{self.name} runs once at a time"
        with contextlib.ExitStack() as stack:
            output = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                if not again:
                    self.log.write_bytes(b"")
                # Append mode: after a truncation, writes continue at the new end.
                output = stack.enter_context(self.log.open("ab"))
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output if output is not None else sys.stderr,
                stderr=subprocess.STDOUT,
                pass_fds=self.inherited_fds,
                # Its own session: Ctrl-C reaches the supervisor only, and one signal reaches the whole process group.
                start_new_session=True,
                preexec_fn=_before_exec(os.getpid(), self.yields_to_engine),  # noqa: PLW1509 (no other thread runs yet)
            )

    def rotate_log(self) -> None:
        """Move a log that exceeds MAX_LOG_BYTES to `….log.1`, replacing the one before."""
        with contextlib.suppress(OSError):
            if self.log is not None and self.log.stat().st_size > MAX_LOG_BYTES:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def crash_error(self) -> ServingError:
        """The error for a process that ended or hung without being stopped."""
        assert self._process is not None, f"{self.name} was not started"
        code = self._process.returncode
        if code is None:
            reason = "it does not respond"
        else:
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self.log is None:
            return ServingError(f"{self.name} ended unexpectedly ({reason}); its log is above")
        return ServingError(f"{self.name} ended unexpectedly ({reason}); the end of {self.log}:", self._log_end())

    def _log_end(self) -> str:
        assert self.log is not None, "there is no log file"
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join([line for line in lines if line.strip()][-_LOG_LINES_SHOWN:])

    def terminate(self) -> None:
        """Send SIGTERM and do not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Send SIGTERM, then SIGKILL after `exit_seconds`. May be called twice."""
        self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=self.exit_seconds)
        # Its own children are in its process group and would survive a crash.
        self._end_group()

    def _end_group(self) -> None:
        assert self._process is not None, f"{self.name} was not started"
        members = _group_members(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # They are killed, but have their memory and ports until they are gone.
        deadline = time.monotonic() + _GONE_SECONDS
        while any(map(is_alive, members)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _group_members(leader: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == leader:
                members.append(process)
    return members


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not, and the machine's init process reaps it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _before_exec(parent: int, yields_to_engine: bool) -> Callable[[], None]:
    """A preexec function: the kernel sends the child SIGTERM when its parent dies."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the prctl call
            os.kill(os.getpid(), signal.SIGTERM)
        if yields_to_engine:
            lower_thread_priority()

    return prepare
