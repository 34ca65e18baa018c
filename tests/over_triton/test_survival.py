"""Real processes are killed and stopped: streams are resumed, health reports the fault, everything recovers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm import Client
from tritonlm.access.control_secret import VARIABLE
from tritonlm.contract import InsufficientScope
from tritonlm.serving import ServingError

from .servers import LM, WAIT_SECONDS, copy_repository, running, wait_until
from .test_serve import LONG_DRAIN, Serve, serving

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parents[2]
LONG: dict[str, Any] = {
    "model": LM, "prompt": "Once", "max_tokens": 440, "ignore_eos": True, "stream": True, "temperature": 1, "seed": 5,
    "logprobs": 1, "stream_options": {"include_usage": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("survival")
    # Slow enough that a fault occurs while it runs.
    with serving(copy_repository(folder, slow="native"), folder) as serve:
        yield serve


def find_process(serve: Serve, name: str) -> psutil.Process:
    """Triton's process, or that of a model."""

    def find() -> psutil.Process | None:
        for process in psutil.Process(serve.process.pid).children(recursive=True):
            # A process may end, or not have started its program, while it is looked at.
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = process.cmdline()
                if Path(command[0]).name == name or (len(command) > 2 and command[-2] == f"{name}_0_0"):
                    return process
        return None

    deadline = time.monotonic() + WAIT_SECONDS
    while (found := find()) is None:
        assert time.monotonic() < deadline, f"waited in vain until {name} runs"
        time.sleep(0.02)
    return found


def stream_events(url: str, on_third_event: Any = lambda: None, **fields: Any) -> list[dict[str, Any]]:
    """All events of the long stream."""
    events, body = [], {**LONG, **fields}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT_SECONDS, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data:") and not line.endswith("[DONE]"):
                events.append(json.loads(line[5:]))
                assert "error" not in events[-1], events[-1]
                if len(events) == 3:
                    on_third_event()
    return events


def collected(events: list[dict[str, Any]]) -> tuple[str, list[Any], Any]:
    """The text, the log-probability of each token, and the usage."""
    choices = [choice for event in events for choice in event["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    text = "".join(choice["text"] for choice in choices)
    values = [value for entry in logprobs for value in entry["token_logprobs"]]
    return text, values, events[-1]["usage"]


@pytest.fixture(scope="module")
def undisturbed(served: Serve) -> tuple[str, list[Any], Any]:
    """What is collected of the long stream without a fault."""
    return collected(stream_events(f"http://127.0.0.1:{served.ports['port']}"))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("generate", signal.SIGKILL), ("tokenize", signal.SIGKILL), ("detokenize", signal.SIGKILL),
        ("tritonserver", signal.SIGKILL), ("generate", signal.SIGSTOP), ("tritonserver", signal.SIGSTOP),
    ],
    ids=lambda value: value if isinstance(value, str) else signal.Signals(value).name,
)  # fmt: skip
def test_a_stream_is_resumed_after_a_fault(
    served: Serve, undisturbed: tuple[str, list[Any], Any], name: str, fault: signal.Signals
) -> None:
    url = f"http://127.0.0.1:{served.ports['port']}"
    text, values, usage = collected(stream_events(url, lambda: find_process(served, name).send_signal(fault)))
    assert text == undisturbed[0]
    # Prefill and decode may round differently: few log-probabilities may differ by slightly more than 1e-5. A wrong
    # token or position would differ a thousand times as much.
    differences = [abs(value - expected) for value, expected in zip(values, undisturbed[1], strict=True)]
    assert sum(difference > 1e-5 for difference in differences) <= len(differences) // 100
    assert max(differences) < 1e-4
    assert usage["completion_tokens"] == undisturbed[2]["completion_tokens"] == LONG["max_tokens"]
    wait_until(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200, "the server is ready")


def test_a_constrained_stream_is_resumed_after_a_killed_engine(served: Serve) -> None:
    """The new process feeds the tokens so far to the grammar, and goes on in it."""
    url = f"http://127.0.0.1:{served.ports['port']}"
    form = {"json": {"type": "array", "items": {"enum": ["north", "northeast", "south", 12]}, "minItems": 200}}
    expected = collected(stream_events(url, structured_outputs=form))
    text, values, usage = collected(stream_events(url, find_process(served, "generate").kill, structured_outputs=form))
    assert text.startswith("[")
    assert (text, usage["completion_tokens"]) == (expected[0], LONG["max_tokens"])
    # As above: prefill and decode may round differently.
    assert values == pytest.approx(expected[1], abs=1e-4)


def test_a_process_that_dies_during_the_drain_does_not_break_a_stream(tmp_path: Path) -> None:
    with serving(copy_repository(tmp_path, slow="native"), tmp_path, *LONG_DRAIN) as serve:
        url = f"http://127.0.0.1:{serve.ports['port']}"

        def stop_and_kill() -> None:
            serve.process.terminate()
            wait_until(lambda: serve.status()["draining"], "the engine refuses new requests")
            find_process(serve, "detokenize").kill()

        expected = collected(stream_events(url))
        text, _, usage = collected(stream_events(url, stop_and_kill))
        assert text == expected[0]
        assert usage["completion_tokens"] == LONG["max_tokens"]
        assert serve.process.wait(WAIT_SECONDS) == 0, serve.output.read_text()


def test_health_reports_a_hanging_process(served: Serve) -> None:
    url = f"http://127.0.0.1:{served.ports['port']}"
    assert httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200
    find_process(served, "tokenize").send_signal(signal.SIGSTOP)
    answer = httpx.get(f"{url}/health/ready", timeout=20, trust_env=False)
    assert answer.status_code == 503
    assert LM in answer.json()["note"]
    assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{url}/health/live", trust_env=False).status_code == 200
    wait_until(lambda: httpx.get(f"{url}/health/ready", timeout=20, trust_env=False).is_success, "it is restarted")


def test_a_request_that_is_not_streamed_survives_a_killed_engine(served: Serve) -> None:
    with Client(served.grpc) as client:
        parameters: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "seed": 3}
        expected = client.completions.create(LM, "Once", **parameters)
        killing = threading.Timer(0.3, lambda: find_process(served, "generate").kill())
        killing.start()
        completion = client.completions.create(LM, "Once", **parameters)
        killing.join()
    assert completion.choices[0].text == expected.choices[0].text
    assert completion.usage == expected.usage


def test_a_request_during_a_gateway_restart_waits_for_the_new_gateway(served: Serve) -> None:
    url = f"http://127.0.0.1:{served.ports['port']}"
    gateway = next(
        process for process in psutil.Process(served.process.pid).children() if "gateway" in process.cmdline()
    )
    gateway.kill()
    gateway.wait(WAIT_SECONDS)
    # The supervisor holds the port open, so the connection is not refused.
    assert httpx.get(f"{url}/health/ready", timeout=WAIT_SECONDS, trust_env=False).is_success


def test_the_control_api_requires_the_secret(served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    http = f"http://127.0.0.1:{served.ports['http_port']}/v2"
    for call in ("repository/index", f"repository/models/{LM}/load", f"repository/models/{LM}/unload"):
        assert httpx.post(f"{http}/{call}", json={}, trust_env=False).status_code == 403
    for call in ("systemsharedmemory/status", "logging", "trace/setting"):
        assert httpx.get(f"{http}/{call}", trust_env=False).status_code == 403
    with grpc.insecure_channel(served.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for method, request in (
            (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
            (stub.RepositoryModelLoad, service_pb2.RepositoryModelLoadRequest(model_name=LM)),
            (stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest(model_name=LM)),
            (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        ):
            with pytest.raises(grpc.RpcError, match="restricted"):
                method(request, timeout=10)
    with Client(served.grpc) as client:
        assert [model.id for model in client.models.list().data] == [LM]
        monkeypatch.setenv(VARIABLE, "wrong")
        with pytest.raises(InsufficientScope, match=VARIABLE):
            client.models.list()
        # Inference needs no secret.
        assert client.completions.create(LM, "Once", max_tokens=2).choices[0].text


@pytest.mark.parametrize("fails", [False, True], ids=["loads", "fails"])
def test_a_slow_load_succeeds_or_reports_its_error(tmp_path: Path, fails: bool) -> None:
    """The load takes longer than the timeout of one call to Triton."""
    repository = copy_repository(tmp_path)
    model = repository / "generate" / "1" / "model.py"
    begin = "        folder = checkpoint_folder(args, weights=True)\n"
    slow = "        time.sleep(3)\n" + ("        raise RuntimeError('a broken thing')\n" if fails else "")
    source = model.read_text(encoding="utf-8")
    assert begin in source
    model.write_text(source.replace(begin, slow + begin), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        if fails:
            with pytest.raises(ServingError, match=r"tiny does not load: .*a broken thing"):
                stack.enter_context(running(repository))
        else:
            assert stack.enter_context(running(repository)).generate(text_input="Once").is_success


def test_chaos() -> None:
    """A short run of scripts/chaos: the exit code is 1 when an output differs from an undisturbed run."""
    command = [
        sys.executable,
        str(ROOT / "load_tests" / "chaos.py"),
        "--faults",
        "3",
        "--clients",
        "10",
        "--pause",
        "3",
    ]
    result = subprocess.run(
        command, env={**os.environ}, check=False, capture_output=True, text=True, timeout=280
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "; 0 were not" in result.stdout
    constrained, answered = map(int, re.findall(r"(\d+) of (\d+) answers had to follow a form", result.stdout)[0])
    assert 0.2 * answered < constrained < answered
