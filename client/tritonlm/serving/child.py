"""A process of ours: started, watched, ended, and never outliving the supervisor. It does not know what runs in it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from .errors import ServingError

_PR_SET_PDEATHSIG = 1
_LOG_LINES_SHOWN = 12
LONGEST_LOG = 64 * 2**20


class Child:
    """A context: inside it the process runs, after it nothing of it is left."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        exit_seconds: float,
    ) -> None:
        """Without a log file its output goes to our own stderr."""
        # Descriptors that it gets beside its output.
        self.given: Sequence[int] = ()
        self.name, self.command, self.environment = name, list(command), dict(environment)
        self.log, self.exit_seconds = log, exit_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def process_id(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def restart(self) -> None:
        """Once more, after it has ended or instead of what hangs; its log goes on where it was."""
        if self._process is not None:
            # What hangs would not hear a polite request.
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
                # Appending: a log that is cut short goes on at its new end.
                output = stack.enter_context(self.log.open("ab"))
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output if output is not None else sys.stderr,
                stderr=subprocess.STDOUT,
                pass_fds=self.given,
                # A session of its own: Ctrl-C reaches the supervisor alone, and one signal reaches the whole group.
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 (no thread of ours runs yet)
            )

    def keep_log_short(self) -> None:
        """What there is beyond the bound becomes the log before this one, of which there is one."""
        with contextlib.suppress(OSError):
            if self.log is not None and self.log.stat().st_size > LONGEST_LOG:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def crash(self) -> ServingError:
        """What to tell of a process that ended although nobody stopped it."""
        assert self._process is not None, f"{self.name} was not started"
        code = self._process.returncode
        if code is None:
            how = "it does not answer"
        else:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self.log is None:
            return ServingError(f"{self.name} ended unexpectedly ({how}); its log is above")
        return ServingError(f"{self.name} ended unexpectedly ({how}); the end of {self.log}:", self._log_end())

    def _log_end(self) -> str:
        assert self.log is not None, "there is no log file"
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join([line for line in lines if line.strip()][-_LOG_LINES_SHOWN:])

    def ask_to_end(self) -> None:
        """Politely, and without waiting for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End the process, politely first. Takes a bounded time; may be called twice."""
        self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self.ask_to_end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=self.exit_seconds)
        # Its own children live in its group; after a crash they would live on.
        self._end_group()

    def _end_group(self) -> None:
        assert self._process is not None, f"{self.name} was not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _die_with(supervisor: int) -> Callable[[], None]:
    """For the child, before it becomes another program: ask the kernel for SIGTERM once the supervisor is gone."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:  # it died before the kernel was asked
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
