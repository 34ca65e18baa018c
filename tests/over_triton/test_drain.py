"""A gateway that is asked to stop: not ready, no new work, running streams end, exit code 0; or a hard limit."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tritonlm import Client

from .servers import LM, WAIT_SECONDS, Server, copy_repository, free_ports, running, wait_until

pytestmark = pytest.mark.triton

BODY: dict[str, Any] = {"model": LM, "prompt": "Once", "temperature": 0, "ignore_eos": True, "max_tokens": 480}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(copy_repository(tmp_path_factory.mktemp("drain"), slow=True, n_layer=12, n_embd=128)) as server:
        yield server


@contextlib.contextmanager
def gateway(server: Server, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_ports()["port"]
    command = [sys.executable, "-m", "tritonlm.cli", "gateway", "--triton", server.grpc, "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status(f"{url}/health/ready") == 200, "the gateway is ready")
        yield process, url
    finally:
        process.kill()
        process.wait(WAIT_SECONDS)


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=20, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def test_running_streams_end_and_new_work_is_sent_elsewhere(slow: Server, tmp_path: Path) -> None:
    with gateway(slow, tmp_path / "log") as (process, url), httpx.Client(timeout=60, trust_env=False) as http:
        with http.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(f"{url}/health/ready") == 503, "it is not ready any more")
            assert status(f"{url}/health/live") == 200
            refused = http.post(f"{url}/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        assert process.wait(WAIT_SECONDS) == 0


def test_there_is_an_end_to_waiting(slow: Server, tmp_path: Path) -> None:
    body = {**BODY, "stream": True}
    with (
        gateway(slow, tmp_path / "log", "--drain-seconds", "0.5") as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as response,
    ):
        next(response.iter_lines())
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 0
    # The engine has nobody left to work for.
    wait_until(slow.holds_nothing, "nothing runs")
    with Client(slow.grpc) as client:
        assert client.completions.create(LM, "Once", max_tokens=2).choices[0].text
