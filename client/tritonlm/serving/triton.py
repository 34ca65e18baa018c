"""One local `tritonserver` process: its command line, environment, start, end and crash.

It knows how Triton is run, not what is loaded into it (see `control`) nor when to stop (see `supervisor`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from . import paths
from .backend import Installation
from .errors import ServingError
from .preflight import SHARED_MEMORY
from .settings import LogLevel, Settings

# Running requests were given drain_seconds before; what is left then is cut off.
EXIT_SECONDS = 5
_PR_SET_PDEATHSIG = 1
_LOG_LINES_SHOWN = 12

_LOG_FLAGS: dict[LogLevel, list[str]] = {
    "debug": ["--log-verbose=1"],
    "info": [],
    "warning": ["--log-info=false"],
    "error": ["--log-info=false", "--log-warning=false"],
}


def triton_environment(installation: Installation, settings: Settings) -> dict[str, str]:
    """Our environment, plus what lets Triton and the Python inside its model processes find this one's packages."""
    package_root = Path(__file__).resolve().parents[2]
    python_path = [str(package_root), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    python_path += site.getsitepackages()
    environment = {
        # Spinning OpenMP threads starve the other processes when cores are few.
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        **settings.engine_environment(),
    }

    def lead(name: str, values: Sequence[str]) -> None:
        old = environment.get(name, "")
        environment[name] = os.pathsep.join([*dict.fromkeys(values), *([old] if old else [])])

    # A model process's embedded Python finds its prefix through the first `python3` on PATH.
    lead("PATH", [str(Path(sys.executable).parent)])
    lead("PYTHONPATH", python_path)
    lead("LD_LIBRARY_PATH", [str(folder) for folder in installation.library_path])
    return environment


def triton_command(binary: Path, backend: Path, settings: Settings, shared_memory_prefix: str) -> list[str]:
    return [
        str(binary),
        *(f"--model-repository={folder.resolve()}" for folder in settings.model_repository),
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        f"--backend-directory={backend}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
        *(f"--{door}-address={settings.host}" for door in ("http", "grpc", "metrics")),
        f"--http-port={settings.http_port}",
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-port={settings.metrics_port}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        *_LOG_FLAGS[settings.log_level],
    ]


class LocalTriton:
    """A context: inside it Triton runs, after it neither a process nor a shared-memory file of it is left."""

    def __init__(self, settings: Settings, installation: Installation, backend: Path) -> None:
        # Unique per run, so that clearing up never touches another Triton's regions.
        self.shared_memory_prefix = f"tritonlm-{os.getpid()}-{secrets.token_hex(4)}-"
        self.command = triton_command(installation.binary, backend, settings, self.shared_memory_prefix)
        self.environment = triton_environment(installation, settings)
        # At debug level the log goes to our own stderr instead.
        self.log: Path | None = None
        if settings.log_level != "debug":
            self.log = paths.cache() / "logs" / f"triton-{settings.http_port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalTriton:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def process_id(self) -> int:
        assert self._process is not None, "Triton was not started"
        return self._process.pid

    def start(self) -> None:
        assert self._process is None, "Triton is started once"
        with contextlib.ExitStack() as stack:
            output = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(self.log.open("wb"))
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output if output is not None else sys.stderr,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C reaches the supervisor alone, and one signal reaches all of Triton.
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 (no thread of ours runs yet)
            )

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> ServingError:
        """Block until Triton ends of itself; the answer tells of the crash."""
        assert self._process is not None, "Triton was not started"
        self._process.wait()
        return self.crash()

    def crash(self) -> ServingError:
        """What to tell of a Triton that ended although nobody stopped it."""
        assert self._process is not None, "Triton was not started"
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        if self.log is None:
            return ServingError(f"Triton ended unexpectedly ({how}); its log is above")
        return ServingError(f"Triton ended unexpectedly ({how}); the end of {self.log}:", self._log_end())

    def _log_end(self) -> str:
        assert self.log is not None, "at debug level there is no log file"
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join([line for line in lines if line.strip()][-_LOG_LINES_SHOWN:])

    def stop(self) -> None:
        """End Triton, politely first, and remove what it may have left. Takes a bounded time; may be called twice."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=EXIT_SECONDS + 5)
        # The group holds the model processes too; after a crash they would live on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for region in SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            region.unlink(missing_ok=True)


def _die_with(supervisor: int) -> Callable[[], None]:
    """For the child, before it becomes Triton: ask the kernel for SIGTERM once the supervisor is gone."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:  # it died before the kernel was asked
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
