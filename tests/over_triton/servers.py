"""Local Tritons for tests: a copy of the model repository with its own checkpoint, free ports, always stopped.

It knows how a Triton is started and what it leaves behind, not what is asked of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tritonlm.contract.control import STATUS, Command
from tritonlm.serving import Settings, paths
from tritonlm.serving.catalogue import catalogue
from tritonlm.serving.control import TritonControl
from tritonlm.serving.supervisor import prepare, start

LM, ENGINE = "tiny", "generate"
LOAD_SECONDS = 120.0
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """Where a running Triton is reached."""

    grpc: str
    http: httpx.Client
    control: TritonControl
    process_id: int

    def command(self, name: str, request_id: str = "") -> dict[str, Any]:
        return self.control.command(ENGINE, Command(name, request_id))

    def status(self) -> dict[str, Any]:
        return self.command(STATUS)

    def generate(self, **body: object) -> httpx.Response:
        return self.http.post(f"/v2/models/{LM}/generate", json=body)

    def holds_nothing(self) -> bool:
        status = self.status()
        return (status["running"], status["waiting"], status["blocks_used"]) == (0, 0, 0)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def free_ports() -> dict[str, int]:
    """Ports that nobody listens on, as settings."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        numbers = [opened.getsockname()[1] for opened in sockets]
    return dict(zip(("port", "http_port", "grpc_port", "metrics_port"), numbers, strict=True))


def copy_repository(folder: Path, **checkpoint: Any) -> Path:
    """The model repository as it is in this checkout, with a checkpoint made for the test (see make_checkpoint)."""
    repository = folder / "model_repository"
    made = paths.model_repository() / LM / "1"

    def ignored(parent: str, names: list[str]) -> list[str]:
        return names if Path(parent) == made else [name for name in names if name == "__pycache__"]

    shutil.copytree(paths.model_repository(), repository, ignore=ignored)
    make_checkpoint(repository / LM / "1", **checkpoint)
    return repository


def make_checkpoint(folder: Path, **options: Any) -> None:
    script = paths.model_repository().parent / "scripts" / "make_tiny_lm.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None, f"{script} is no module"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Path = module.make_checkpoint(folder, **options)
    return made


@contextlib.contextmanager
def running(repository: Path, **settings: Any) -> Iterator[Server]:
    """A Triton that has loaded the LM; computing in float32 on the CPU, so that texts can be compared."""
    chosen = Settings(
        **{
            "model_repository": [repository],
            "gateway": False,
            "device": "cpu",
            "dtype": "float32",
            **free_ports(),
            **settings,
        }
    )
    _, triton = prepare(chosen, catalogue(chosen))
    with contextlib.ExitStack() as stack, TritonControl(chosen.triton_host, chosen.http_port) as control:
        stack.callback(triton.stop)
        start(triton, control)
        control.load(LM, LOAD_SECONDS)
        with httpx.Client(base_url=control.url, timeout=WAIT_SECONDS, trust_env=False) as http:
            yield Server(f"{chosen.triton_host}:{chosen.grpc_port}", http, control, triton.process_id)
