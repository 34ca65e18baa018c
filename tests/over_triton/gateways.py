"""`tritonlm gateway` as a process in front of a Triton that the tests have started, and clients that disconnect."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from .servers import WAIT_SECONDS, free_ports, wait_until


@dataclass(frozen=True)
class Gateway:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def lives(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/health/live", trust_env=False).is_success
        except httpx.TransportError:
            return False


@contextlib.contextmanager
def gateway_to(triton: str, folder: Path, *options: str) -> Iterator[Gateway]:
    port, log = free_ports()["port"], folder / "gateway.log"
    command = [sys.executable, "-m", "tritonlm.cli", "gateway", "--triton", triton, "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    gateway = Gateway(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until(gateway.lives, "the gateway answers")
        yield gateway
    except BaseException:
        sys.stderr.write(f"the log of the gateway of {triton}:\n{log.read_text(errors='replace')}")
        raise
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WAIT_SECONDS)
        process.kill()
        process.wait(WAIT_SECONDS)


def leave(url: str, body: dict[str, object], stream: bool, when: Callable[[], None]) -> None:
    """Send a request and drop the connection when `when` returns."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps({**body, "stream": stream}).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
        when()
