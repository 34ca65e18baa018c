"""`tritonlm serve` as a process of its own, from its banner to the last file that it must not leave."""

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

from .caller import ask, call
from .gateways import leave
from .servers import ENGINE, LM, WAIT_SECONDS, copy_repository, free_ports, wait_until

pytestmark = pytest.mark.triton

# Running requests may take so long: on a slow machine the usual time is too short for theirs.
PATIENT = ("--drain-seconds", "90")
LONG: dict[str, Any] = {"prompt": "Once", "temperature": 0.0, "max_tokens": 480, "ignore_eos": True}


@dataclass(frozen=True)
class Serve:
    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    output: Path

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc_port']}"

    def said(self, text: str) -> bool:
        assert self.process.poll() is None or text in self.output.read_text(), self.output.read_text()
        return text in self.output.read_text()

    def status(self) -> dict[str, Any]:
        with TritonControl("127.0.0.1", self.ports["http_port"]) as control:
            return control.command(ENGINE, Command(STATUS))

    def shared_memory(self) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"tritonlm-{self.process.pid}-*"))


@pytest.fixture(scope="module")
def slow_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LM that is busy with a full context for seconds, so that a signal finds it at work."""
    return copy_repository(tmp_path_factory.mktemp("slow"), slow=True, n_layer=16, n_embd=256)


@contextlib.contextmanager
def serving(
    repository: Path, folder: Path, *options: str, meanwhile: Callable[[psutil.Process], None] = lambda _: None
) -> Iterator[Serve]:
    """`meanwhile` is done while it starts."""
    ports = free_ports()
    command = [sys.executable, "-m", "tritonlm.cli", "serve", "--model-repository", str(repository), *options]
    if repository != model_repository():
        command += ["--load", LM]
    command += [part for name, port in ports.items() for part in ("--" + name.replace("_", "-"), str(port))]
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    serve = Serve(process, ports, output)
    try:
        meanwhile(psutil.Process(process.pid))
        wait_until(lambda: serve.said("tritonlm is serving"), "the banner is there")
        yield serve
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WAIT_SECONDS)
            process.kill()
        process.wait(WAIT_SECONDS)


def lives(process: psutil.Process) -> bool:
    """A zombie has ended: whether somebody collects it is a matter of the machine's first process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def leaving_nothing(serve: Serve) -> Iterator[None]:
    """Inside, the server ends: with exit code 0, without a process or a file of it left."""
    family = psutil.Process(serve.process.pid).children(recursive=True)
    assert len(family) >= 5, "the gateway, tritonserver and its three model processes"
    assert serve.shared_memory()
    yield
    assert serve.process.wait(WAIT_SECONDS) == 0, serve.output.read_text()
    assert [process for process in family if lives(process)] == []
    assert serve.shared_memory() == []


def test_sigterm_lets_running_streams_end_first(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, *PATIENT) as serve, contextlib.ExitStack() as stack:
        calls = [stack.enter_context(call(serve.grpc, stream=stream, **LONG)) for stream in (True, True, False)]
        first = calls[0].next()
        wait_until(lambda: serve.status()["running"] == len(calls), "all of them run")
        with leaving_nothing(serve):
            serve.process.terminate()
            wait_until(lambda: serve.status()["draining"], "the engine refuses new requests")
            assert serve.status()["running"] == len(calls)
            with pytest.raises(Draining):
                ask(serve.grpc, "too late")
            answers = [calls[0].answer(first), *(made.answer() for made in calls[1:])]
        for answer in answers:
            assert answer.last.finish_reason == "length"
            assert answer.last.usage.completion == LONG["max_tokens"]
        assert answers[0].text == answers[1].text == answers[2].text


def test_the_gateway_answers_beside_triton_and_drains_with_it(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, *PATIENT) as serve:
        assert f"http://127.0.0.1:{serve.ports['port']}/v1" in serve.output.read_text()
        url = f"http://127.0.0.1:{serve.ports['port']}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk:
            assert [model.id for model in sdk.models.list()] == ["tiny"]
            wanted: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0}
            whole = sdk.completions.create(**wanted, max_tokens=20)
            stream = sdk.completions.create(**wanted, max_tokens=480, stream=True, extra_body={"ignore_eos": True})
            begun = next(iter(stream)).choices[0].text
            with leaving_nothing(serve):
                serve.process.terminate()
                wait_until(lambda: serve.status()["draining"], "the engine refuses new requests")
                with pytest.raises(openai.InternalServerError) as refused:
                    sdk.completions.create(**wanted)
                assert refused.value.status_code == 503
                text = begun + "".join(chunk.choices[0].text for chunk in stream)
    assert text.startswith(whole.choices[0].text)
    assert len(text) > 2 * len(whole.choices[0].text)


@pytest.mark.parametrize(
    ("fault", "what"), [(signal.SIGKILL, "ended"), (signal.SIGSTOP, "does not answer")], ids=["dies", "hangs"]
)
def test_a_triton_that_fails_while_it_loads_is_started_again(
    slow_repository: Path, tmp_path: Path, fault: signal.Signals, what: str
) -> None:
    def end_triton(supervisor: psutil.Process) -> None:
        def loads() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                return any(child.name().startswith("triton_python") for child in supervisor.children(recursive=True))
            # One has ended while we looked.
            return False

        wait_until(loads, "a model's process is there")
        # A process that it is just starting has its name too.
        (triton,) = [child for child in supervisor.children() if child.name().startswith("tritonserver")]
        triton.send_signal(fault)

    with serving(slow_repository, tmp_path, meanwhile=end_triton) as serve:
        assert f"Triton {what} while it loads: starting it again" in serve.output.read_text()
        assert ask(serve.grpc, "Once", max_tokens=5, ignore_eos=True).last.usage.completion == 5
        with leaving_nothing(serve):
            serve.process.terminate()


def test_a_caller_that_leaves_frees_its_places(slow_repository: Path, tmp_path: Path) -> None:
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


def test_sigterm_waits_no_longer_than_told(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, "--drain-seconds", "0.5") as serve, call(serve.grpc, **LONG) as made:
        made.next()
        with leaving_nothing(serve):
            serve.process.terminate()
            # Cut off: an error or a response that says so, but no stream that never ends.
            reason = "cut off"
            with contextlib.suppress(Exception):
                reason = made.answer().last.finish_reason
        assert reason in ("cut off", "cancelled")
        assert "cut off the running requests of tiny" in serve.output.read_text()


def test_a_second_signal_stops_at_once(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path) as serve, call(serve.grpc, **LONG) as made:
        made.next()
        with leaving_nothing(serve):
            serve.process.terminate()
            wait_until(lambda: serve.said("stopping:"), "it says that it is stopping")
            serve.process.send_signal(signal.SIGINT)


def test_a_killed_supervisor_takes_triton_with_it(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path) as serve:
        family = psutil.Process(serve.process.pid).children(recursive=True)
        os.kill(serve.process.pid, signal.SIGKILL)
        serve.process.wait(WAIT_SECONDS)
        wait_until(lambda: not any(map(lives, family)), "every process has ended")
        for region in serve.shared_memory():
            region.unlink()
