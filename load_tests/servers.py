"""Starts the servers of a load test: Tritons and a gateway as separate processes on free loopback ports.

It uses tritonlm's commands and HTTP only, and ends only the processes that it has started.
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
class Service:
    """One `tritonlm serve` or `tritonlm gateway`."""

    process: psutil.Popen
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Its running processes, including itself."""
        running = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self.process, *self.process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        running.append(process)
        return running

    def part(self, kind: str, model: str = "") -> psutil.Process | None:
        """Its Triton, or the process of a model's part (tokenize, generate, detokenize); None if it does not run."""
        for process in self.processes():
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
    tritons: list[Service]
    gateway: Service

    def processes(self) -> list[psutil.Process]:
        return [process for service in (*self.tritons, self.gateway) for process in service.processes()]

    def memory(self) -> int:
        """The unique set size (USS) of all processes in bytes."""
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
    """Tritons with the bundled language models, and a gateway; `serve` and `gateway` are further options."""
    folder = Path(tempfile.mkdtemp(prefix="tritonlm-load-"))
    tritons: list[Service] = []
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
        # An empty key file, unless the test passes its own.
        keys = [] if "--keys" in gateway else ["--keys", str(folder / "keys.json")]
        command = ["gateway", "--port", str(port), *addresses, *keys, *gateway]
        servers = Fleet(f"http://127.0.0.1:{port}", tritons, stack.enter_context(_running(command, log)))
        wait_until_ready(servers)
        yield servers


@contextlib.contextmanager
def _running(arguments: Sequence[str], log: Path) -> Iterator[Service]:
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "tritonlm.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    service = Service(process, log)
    try:
        yield service
    finally:
        processes = service.processes()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            for child in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def wait_until_ready(servers: Fleet) -> None:
    """Wait until all language models answer."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        for service in (*servers.tritons, servers.gateway):
            if not service.process.is_running() or service.process.poll() is not None:
                raise SystemExit(f"{' '.join(service.process.args[2:5])} ended:\n{service.log.read_text()[-2000:]}")
        if all("is serving" in service.log.read_text() for service in servers.tritons):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{servers.url}/health/ready", timeout=10, trust_env=False).status_code == 200:
                    return
        if time.monotonic() > deadline:
            raise SystemExit("the servers did not become ready in time")
        time.sleep(0.2)
