"""The same model repository under a plain `tritonserver`: no control mode, no supervisor, no engine settings."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from engine.runners.native.build import CACHE
from process_owner import MARK
from tritonlm.serving.backend import assemble, find_installation

from .caller import complete
from .servers import LM, WAIT_SECONDS, free_ports, wait_until

pytestmark = pytest.mark.triton


@contextlib.contextmanager
def tritonserver(repository: Path, ports: dict[str, int], log: Path, *options: str) -> Iterator[None]:
    installation = find_installation()
    command = [
        str(installation.binary),
        f"--model-repository={repository}",
        f"--backend-directory={assemble(installation)}",
        *(f"--{name.replace('_', '-')}={port}" for name, port in ports.items() if name != "port"),
        *options,
    ]
    libraries = os.pathsep.join(str(folder) for folder in installation.library_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "LD_LIBRARY_PATH": libraries, "HOME": os.environ.get("HOME", "/")}
    # Reuse the compiled kernels: compiling them again would take most of the test's time. The mark of the test run ends
    # the process with the run.
    environment |= {name: os.environ[name] for name in (CACHE, MARK) if name in os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(WAIT_SECONDS)
        finally:
            process.kill()


@pytest.mark.parametrize("metrics", ["true", "false"])
def test_a_plain_tritonserver_serves_the_repository(repository: Path, tmp_path: Path, metrics: str) -> None:
    ports = free_ports()
    log = tmp_path / "triton.log"
    with (
        tritonserver(repository, ports, log, f"--allow-metrics={metrics}"),
        httpx.Client(base_url=f"http://127.0.0.1:{ports['http_port']}", timeout=WAIT_SECONDS, trust_env=False) as http,
    ):

        def is_ready() -> bool:
            try:
                return http.get("/v2/health/ready").is_success
            except httpx.TransportError:
                return False

        wait_until(is_ready, f"Triton is ready; see {log}")
        body = {"text_input": "Once", "temperature": 0, "max_tokens": 10}
        whole = http.post(f"/v2/models/{LM}/generate", json=body).raise_for_status().json()
        assert whole["text_output"].startswith("Once")
        streamed = complete(f"127.0.0.1:{ports['grpc_port']}", "Once", temperature=0.0, max_tokens=10)
        assert "Once" + streamed.text == whole["text_output"]
