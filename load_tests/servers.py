"""What the load tests run against: Tritons and a gateway as processes of their own, on free ports of the loopback.

It knows tritonlm's commands and HTTP, as anybody does who runs it, and ends only what it has started.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS, STOP_SECONDS = 120.0, 40.0
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Started:
    """One `tritonlm serve` or `tritonlm gateway`."""

    process: psutil.Popen
    log: Path

    def family(self) -> list[psutil.Process]:
        """The living processes under it, itself among them."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self.process, *self.process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def part(self, kind: str, model: str = "") -> psutil.Process | None:
        """Its Triton, or the process of a model's part (tokenize, generate, detokenize); None while there is none."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if kind == "triton" and command and Path(command[0]).name == "tritonserver":
                    return process
                name = f"{model}-{kind}" if model else kind
                if command and Path(command[0]).name == _STUB and command[-2].rsplit("_", 2)[0] == name:
                    return process
        return None


@dataclass(frozen=True)
class Fleet:
    """Tritons, each with its supervisor, and one gateway in front of them."""

    url: str
    tritons: list[Started]
    gateway: Started

    def processes(self) -> list[psutil.Process]:
        return [process for started in (*self.tritons, self.gateway) for process in started.family()]

    def memory(self) -> int:
        """Bytes that all processes together have of their own."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().uss
        return total


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


@contextlib.contextmanager
def fleet(count: int = 1, serve: Sequence[str] = (), gateway: Sequence[str] = ()) -> Iterator[Fleet]:
    """So many Tritons with the bundled language models, and a gateway; more options for each of them."""
    folder = Path(tempfile.mkdtemp(prefix="tritonlm-load-"))
    tritons: list[Started] = []
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        addresses = []
        for number in range(count):
            http, grpc, metrics = free_ports(3)
            addresses += ["--triton", f"127.0.0.1:{grpc}"]
            ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
            log = folder / f"triton-{number}.log"
            tritons.append(stack.enter_context(_running(["serve", "--no-gateway", *ports, *serve], log)))
        (port,) = free_ports(1)
        log = folder / "gateway.log"
        # No keys but those that the test has made.
        keys = [] if "--keys" in gateway else ["--keys", str(folder / "keys.json")]
        front = stack.enter_context(_running(["gateway", "--port", str(port), *addresses, *keys, *gateway], log))
        found = Fleet(f"http://127.0.0.1:{port}", tritons, front)
        wait_until_ready(found)
        yield found


@contextlib.contextmanager
def _running(arguments: Sequence[str], log: Path) -> Iterator[Started]:
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "tritonlm.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    started = Started(process, log)
    try:
        yield started
    finally:
        family = started.family()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


def wait_until_ready(found: Fleet) -> None:
    """All language models answer."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        for started in (*found.tritons, found.gateway):
            if not started.process.is_running() or started.process.poll() is not None:
                raise SystemExit(f"{' '.join(started.process.args[2:5])} ended:\n{started.log.read_text()[-2000:]}")
        if all("is serving" in started.log.read_text() for started in found.tritons):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{found.url}/health/ready", timeout=10, trust_env=False).status_code == 200:
                    return
        if time.monotonic() > deadline:
            raise SystemExit("the servers do not become ready")
        time.sleep(0.2)
