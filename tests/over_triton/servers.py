"""Local Tritons for tests: a copy of the model repository with its own checkpoint, on free ports, always stopped.

It knows how a Triton starts and stops, not what the tests request.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fakes.tiny_lm import make_checkpoint
from tritonlm.contract.control import STATUS, Command
from tritonlm.contract.parts import PARTS
from tritonlm.serving import Settings, paths
from tritonlm.serving.control import TritonControl, deadline_check
from tritonlm.serving.model_selection import select_models, write_models
from tritonlm.serving.supervisor import connection_errors_explained, prepare, start

LM, ENGINE = "tiny", "generate"
Result = TypeVar("Result")
LOAD_SECONDS = 120.0
WAIT_SECONDS = 60.0
# Below those that systems give to connections. Each worker of a run has its own: two that choose the same port at the
# same time would ask each other's server.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS_OF_WORKER, _MAX_WORKERS = 750, 16
_FIRST_PORT = 20_000 + _WORKER % _MAX_WORKERS * _PORTS_OF_WORKER
# In turn, so that none is given again soon: a server may be about to bind it. Another run begins elsewhere.
_OFFSETS = itertools.count(secrets.randbelow(_PORTS_OF_WORKER))
# For the runners that can be slow: their file and their class.
_RUNNERS = {"native": ("native/runner.py", "NativeRunner"), "reference": ("reference.py", "ReferenceRunner")}
_PAUSE_BEFORE_STEPS = """

import time

_forward = {runner}.forward


def _forward_after_a_pause(self, plan):
    time.sleep(0.015)
    return _forward(self, plan)


{runner}.forward = _forward_after_a_pause
"""
_PAUSE_BEFORE_CALLS = """
_decode = NativeRunner.decode


def _decode_after_pauses(self, plan, choice, interrupt, seconds):
    # A pause for each step. A cancel or a new request waits for at most a chunk's time.
    time.sleep(0.015 * choice.steps)
    return _decode(self, plan, choice, interrupt, 60.0)


NativeRunner.decode = _decode_after_pauses
"""


@dataclass(frozen=True)
class Server:
    """The addresses of a running Triton."""

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


def wait_until(condition: Callable[[], Result], what: str) -> Result:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)
    return result


def free_ports() -> dict[str, int]:
    """Free ports, as settings. Not those that the system gives to connections: one would take it before a server."""
    return {name: _free_port() for name in ("port", "http_port", "grpc_port", "metrics_port")}


def _free_port() -> int:
    while True:
        port = _FIRST_PORT + next(_OFFSETS) % _PORTS_OF_WORKER
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("127.0.0.1", port))
            return port


def copy_repository(folder: Path, slow: str = "", **checkpoint: Any) -> Path:
    """The trio as it is in this checkout, tied to an LM `tiny` with a checkpoint made for the test.

    `slow` names a runner, which pauses before each step: tests find their requests still running, and no core is busy.
    The native runner starts in half the time of the reference runner, which imports transformers.
    """
    repository = folder / "model_repository"
    for part in PARTS:
        # With its bytecode, which each Triton would compile again.
        shutil.copytree(paths.model_repository() / part, repository / part)
        config = repository / part / "config.pbtxt"
        config.write_text(config.read_text(encoding="utf-8").replace("../abacus/1", f"../{LM}/1"), encoding="utf-8")
    if slow:
        with (repository / ENGINE / "config.pbtxt").open("a", encoding="utf-8") as config:
            config.write(f'parameters {{ key: "runner" value: {{ string_value: "{slow}" }} }}\n')
        file, name = _RUNNERS[slow]
        with (repository / ENGINE / "1" / "engine" / "runners" / file).open("a", encoding="utf-8") as runner:
            runner.write(_PAUSE_BEFORE_STEPS.format(runner=name) + (_PAUSE_BEFORE_CALLS if slow == "native" else ""))
    (repository / LM).mkdir()
    shutil.copy(paths.model_repository() / "abacus" / "config.pbtxt", repository / LM)
    make_checkpoint(repository / LM / "1", **checkpoint)
    return repository


@contextlib.contextmanager
def running(repository: Path, **settings: Any) -> Iterator[Server]:
    """A Triton that has loaded the LM; computing in float32 on the CPU, so that texts can be compared."""
    chosen = Settings(
        **{
            "model_repository": [repository],
            "load": [LM],
            "gateway": False,
            "device": "cpu",
            "dtype": "float32",
            **free_ports(),
            **settings,
        }
    )
    triton = prepare(chosen, write_models(chosen, select_models(chosen)))
    with contextlib.ExitStack() as stack, TritonControl(chosen.triton_host, chosen.http_port) as control:
        stack.callback(triton.stop)

        def load() -> None:
            with connection_errors_explained(triton, f"loading {LM}"):
                control.load(LM, deadline_check(LOAD_SECONDS))

        start(triton, control, load)
        with httpx.Client(base_url=control.url, timeout=WAIT_SECONDS, trust_env=False) as http:
            yield Server(f"{chosen.triton_host}:{chosen.grpc_port}", http, control, triton.process_id)
