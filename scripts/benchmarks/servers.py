"""The servers of a comparison as processes: started, waited for, stopped, their memory and processor time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import processor
import psutil
import rivals
from checkpoints import FOLDER
from load import Measurement, Workload, measure

OURS, INT8 = "tritonlm", "int8"
# The types of a GGUF file.
STORED = "as stored"
START_SECONDS, STOP_SECONDS = 600.0, 60.0
# One client for all: each reads the certificates again, in processor time that a starting server needs.
_HTTP = httpx.Client(trust_env=False, timeout=2)
# The role of a tritonlm process by a part of its command line; the first match counts.
ROLES = {
    "-generate_": "generate (engine)", "-detokenize_": "detokenize", "-tokenize_": "tokenize",
    "bin/tritonserver": "Triton (IPC, gRPC)", "--default-model": "gateway",
}  # fmt: skip


def role_of(process: psutil.Process) -> str:
    """The role of a process; empty for an unknown one."""
    command = " ".join(process.cmdline())
    return next((role for pattern, role in ROLES.items() if pattern in command), "")


def dtype_of(dtype: str) -> str:
    """The number type of the checkpoint, also for quantized weights."""
    return "bfloat16" if dtype in (INT8, STORED) else dtype


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def status(url: str) -> int:
    """The status of a response; 0 without one."""
    try:
        return _HTTP.get(url).status_code
    except httpx.TransportError:
        return 0


def launch(server: str, folder: Path, dtype: str, port: int) -> rivals.Launch:
    if server != OURS:
        return rivals.launch(server, folder, dtype, port, processor.kind())
    ports = [f"--{protocol}-port={free_port()}" for protocol in ("http", "grpc", "metrics")]
    weights = {"TRITONLM_WEIGHTS": "int8"} if dtype == INT8 else {}
    command = [
        *(sys.executable, "-m", "tritonlm", "serve", "--checkpoint", f"model={folder}"),
        *("--dtype", dtype_of(dtype), "--port", str(port), *ports, "--no-training"),
    ]
    return rivals.Launch(command, "model", weights, rivals.ENDLESS)


@dataclass(frozen=True)
class Running:
    """A running server."""

    url: str
    model: str
    pid: int
    started_at: float
    # Further fields of each request.
    request: dict[str, object]

    def resident_megabytes(self) -> float:
        """The memory of all its processes; shared pages count once."""
        return sum(process.memory_full_info().pss for process in self._processes()) / 1e6

    def processor_seconds(self) -> float:
        """The processor time of all its live processes."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(used.user + used.system for used in times)

    def measure(self, work: Workload, prompts: Sequence[str]) -> Measurement:
        return measure(self.url, self.model, work, prompts, self.request)

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.pid)
        return [server, *server.children(recursive=True)]


@contextlib.contextmanager
def running(server: str, folder: Path, dtype: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Start a server, wait until it is ready, and stop it at the end."""
    with started(server, folder, dtype, options) as process:
        while status(f"{process.url}/health") != httpx.codes.OK:
            if _has_ended(process.pid) or time.monotonic() > process.started_at + START_SECONDS:
                raise RuntimeError(f"{server} does not start; see {FOLDER / server}.log")
            time.sleep(0.02)
        yield process


@contextlib.contextmanager
def started(server: str, folder: Path, dtype: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Start a server without waiting, and stop it at the end."""
    port, log = free_port(), FOLDER / f"{server}.log"
    spec = launch(server, folder, dtype, port)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **spec.environment}
    # On SIGTERM, exit through the context managers, which stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started_at = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*spec.command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield Running(f"http://127.0.0.1:{port}", spec.model, process.pid, started_at, spec.request)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)


def _has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
