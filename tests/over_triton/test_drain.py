"""Draining a gateway: not ready, no new requests, running streams finish up to a limit, exit code 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tritonlm import Client

from .gateways import gateway_to
from .servers import LM, WAIT_SECONDS, Server, copy_repository, running, wait_until
from .test_serve import serving

pytestmark = pytest.mark.triton

BODY: dict[str, Any] = {"model": LM, "prompt": "Once", "temperature": 0, "ignore_eos": True, "max_tokens": 480}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(copy_repository(tmp_path_factory.mktemp("drain"), slow="native")) as server:
        yield server


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=20, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def test_running_streams_finish_and_new_requests_are_refused(slow: Server, tmp_path: Path) -> None:
    with gateway_to(slow.grpc, tmp_path) as gateway, httpx.Client(timeout=60, trust_env=False) as http:
        url, process = gateway.url, gateway.process
        with http.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(f"{url}/health/ready") == 503, "it is not ready")
            assert status(f"{url}/health/live") == 200
            refused = http.post(f"{url}/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        assert process.wait(WAIT_SECONDS) == 0


def test_draining_has_a_time_limit(slow: Server, tmp_path: Path) -> None:
    body = {**BODY, "stream": True}
    with (
        gateway_to(slow.grpc, tmp_path, "--drain-seconds", "0.5") as gateway,
        httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=60, trust_env=False) as response,
    ):
        next(response.iter_lines())
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(WAIT_SECONDS) == 0
    # The engine has no request left.
    wait_until(slow.holds_nothing, "nothing runs")
    with Client(slow.grpc) as client:
        assert client.completions.create(LM, "Once", max_tokens=2).choices[0].text


def test_one_of_two_tritons_stops_without_failed_requests(slow: Server, tmp_path: Path) -> None:
    """As in an upgrade: its streams finish, and new requests go to the other Triton."""
    answers: list[httpx.Response] = []
    other = copy_repository(tmp_path, slow="native")
    stop = threading.Event()
    with (
        serving(other, tmp_path, "--no-gateway") as upgraded,
        gateway_to(slow.grpc, tmp_path, "--triton", upgraded.grpc) as gateway,
    ):

        def send(number: int) -> None:
            while not stop.is_set():
                body = {**BODY, "max_tokens": 120, "stream": bool(number % 2)}
                answers.append(httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60, trust_env=False))

        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(send, number) for number in range(6)]
            wait_until(lambda: upgraded.status()["running"] > 0, "the Triton that will stop has requests")
            upgraded.process.terminate()
            assert upgraded.process.wait(WAIT_SECONDS) == 0
            before = len(answers)
            wait_until(lambda: len(answers) > before + 6, "the other Triton serves")
            stop.set()
            for future in futures:
                future.result()
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    assert all("error" not in answer.text for answer in answers)
    whole = {answer.json()["choices"][0]["text"] for answer in answers if "json" in answer.headers["content-type"]}
    assert len(whole) == 1, "both Tritons generate the same text"
