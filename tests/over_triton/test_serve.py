"""The process `tritonlm serve`: banner, drain, restarts, shutdown without leftover processes or files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tritonlm.contract import Draining
from tritonlm.contract.control import STATUS, Command
from tritonlm.serving.control import TritonControl
from tritonlm.serving.paths import model_repository
from tritonlm.serving.preflight import SHARED_MEMORY

from .caller import call, complete
from .gateways import leave
from .servers import ENGINE, LM, WAIT_SECONDS, copy_repository, free_ports, wait_until

pytestmark = pytest.mark.triton

# A longer drain time: on a slow machine the default is too short for the running requests.
LONG_DRAIN = ("--drain-seconds", "90")
LONG: dict[str, Any] = {"prompt": "Once", "temperature": 0.0, "max_tokens": 480, "ignore_eos": True}


@dataclass(frozen=True)
class Serve:
    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    output: Path

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc_port']}"

    def printed(self, text: str) -> bool:
        assert self.process.poll() is None or text in self.output.read_text(), self.output.read_text()
        return text in self.output.read_text()

    def status(self) -> dict[str, Any]:
        with TritonControl("127.0.0.1", self.ports["http_port"]) as control:
            return control.command(ENGINE, Command(STATUS))

    def shared_memory(self) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"tritonlm-{self.process.pid}-*"))


@pytest.fixture(scope="module")
def slow_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LM that needs seconds for a full context, so that a signal arrives while it runs."""
    return copy_repository(tmp_path_factory.mktemp("slow"), slow="native")


@contextlib.contextmanager
def serving(
    repository: Path, folder: Path, *options: str, during_start: Callable[[psutil.Process], None] = lambda _: None
) -> Iterator[Serve]:
    """`tritonlm serve`, stopped at the end; `during_start` is called while it starts."""
    ports = free_ports()
    command = [sys.executable, "-m", "tritonlm.cli", "serve", "--model-repository", str(repository), *options]
    if repository != model_repository() and "--checkpoint" not in options:
        command += ["--load", LM]
    command += [part for name, port in ports.items() for part in ("--" + name.replace("_", "-"), str(port))]
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    serve = Serve(process, ports, output)
    try:
        during_start(psutil.Process(process.pid))
        wait_until(lambda: serve.printed("tritonlm is serving"), "the banner is printed")
        yield serve
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WAIT_SECONDS)
            process.kill()
        process.wait(WAIT_SECONDS)


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not, and the machine's init process reaps it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def clean_exit(serve: Serve) -> Iterator[None]:
    """The server ends inside this context with exit code 0, and leaves no process and no shared memory."""
    children = psutil.Process(serve.process.pid).children(recursive=True)
    assert len(children) >= 5, "the gateway, tritonserver and its three model processes"
    assert serve.shared_memory()
    yield
    assert serve.process.wait(WAIT_SECONDS) == 0, serve.output.read_text()
    assert [process for process in children if is_alive(process)] == []
    assert serve.shared_memory() == []


def test_sigterm_lets_running_streams_finish(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, *LONG_DRAIN) as serve, contextlib.ExitStack() as stack:
        calls = [stack.enter_context(call(serve.grpc, stream=stream, **LONG)) for stream in (True, True, False)]
        first = calls[0].next()
        wait_until(lambda: serve.status()["running"] == len(calls), "all of them run")
        with clean_exit(serve):
            serve.process.terminate()
            wait_until(lambda: serve.status()["draining"], "the engine refuses new requests")
            assert serve.status()["running"] == len(calls)
            with pytest.raises(Draining):
                complete(serve.grpc, "too late")
            answers = [calls[0].read_all(first), *(request.read_all() for request in calls[1:])]
        for answer in answers:
            assert answer.last.finish_reason == "length"
            assert answer.last.usage.completion == LONG["max_tokens"]
        assert answers[0].text == answers[1].text == answers[2].text


def test_the_gateway_serves_and_drains_with_triton(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, *LONG_DRAIN) as serve:
        assert f"http://127.0.0.1:{serve.ports['port']}/v1" in serve.output.read_text()
        url = f"http://127.0.0.1:{serve.ports['port']}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk:
            assert [model.id for model in sdk.models.list()] == ["tiny"]
            parameters: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0}
            whole = sdk.completions.create(**parameters, max_tokens=20)
            stream = sdk.completions.create(**parameters, max_tokens=480, stream=True, extra_body={"ignore_eos": True})
            first_text = next(iter(stream)).choices[0].text
            with clean_exit(serve):
                serve.process.terminate()
                wait_until(lambda: serve.status()["draining"], "the engine refuses new requests")
                with pytest.raises(openai.InternalServerError) as error_info:
                    sdk.completions.create(**parameters)
                assert error_info.value.status_code == 503
                text = first_text + "".join(chunk.choices[0].text for chunk in stream)
    assert text.startswith(whole.choices[0].text)
    assert len(text) > 2 * len(whole.choices[0].text)


@pytest.mark.parametrize(
    ("fault", "problem"), [(signal.SIGKILL, "ended"), (signal.SIGSTOP, "does not answer")], ids=["dies", "hangs"]
)
def test_a_triton_that_fails_while_it_loads_is_restarted(
    slow_repository: Path, tmp_path: Path, fault: signal.Signals, problem: str
) -> None:
    def end_triton(supervisor: psutil.Process) -> None:
        def is_loading() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                return any(child.name().startswith("triton_python") for child in supervisor.children(recursive=True))
            # A child ended during the iteration.
            return False

        wait_until(is_loading, "a model's process exists")
        # A child that Triton has just forked has the same name for a moment.
        (triton,) = [child for child in supervisor.children() if child.name().startswith("tritonserver")]
        triton.send_signal(fault)

    with serving(slow_repository, tmp_path, during_start=end_triton) as serve:
        assert f"Triton {problem} while it loads: restarting it" in serve.output.read_text()
        assert complete(serve.grpc, "Once", max_tokens=5, ignore_eos=True).last.usage.completion == 5
        with clean_exit(serve):
            serve.process.terminate()


def test_a_disconnected_caller_frees_its_slots(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path) as serve:
        base = f"http://127.0.0.1:{serve.ports['port']}"
        body = {"model": "tiny", "prompt": "Once", "n": 3, "max_tokens": 480, "ignore_eos": True}
        with httpx.Client(base_url=base, timeout=60, trust_env=False) as http:
            with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                wait_until(lambda: serve.status()["running"] == 3, "all of them run")
            wait_until(lambda: serve.status()["running"] == 0, "none of them runs")
            leave(base, body, False, lambda: wait_until(lambda: serve.status()["running"] == 3, "they run again"))
            wait_until(lambda: serve.status()["running"] == 0, "none of them runs")
            assert serve.status()["cancelled"] == 6


def test_sigterm_waits_at_most_the_drain_time(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, "--drain-seconds", "0.5") as serve, call(serve.grpc, **LONG) as request:
        request.next()
        with clean_exit(serve):
            serve.process.terminate()
            # The stream ends with an error or a final response; it must not hang.
            reason = "cut off"
            with contextlib.suppress(Exception):
                reason = request.read_all().last.finish_reason
        assert reason in ("cut off", "cancelled")
        assert "cut off the running requests of tiny" in serve.output.read_text()


def test_a_second_signal_stops_immediately(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path) as serve, call(serve.grpc, **LONG) as request:
        request.next()
        with clean_exit(serve):
            serve.process.terminate()
            wait_until(lambda: serve.printed("stopping:"), "the stop message is printed")
            serve.process.send_signal(signal.SIGINT)


def test_killing_the_supervisor_ends_triton(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path) as serve:
        children = psutil.Process(serve.process.pid).children(recursive=True)
        os.kill(serve.process.pid, signal.SIGKILL)
        serve.process.wait(WAIT_SECONDS)
        wait_until(lambda: not any(map(is_alive, children)), "every process has ended")
        for region in serve.shared_memory():
            region.unlink()
