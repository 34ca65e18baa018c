"""Metrics and traces of a real Triton: all documented metrics exist, and one request is one trace."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
from contract_tables import OBSERVABILITY
from engine.monitoring.metrics import METRIC_SPECS, PREFIX
from fakes.collector import Span, collecting
from prometheus_client.parser import text_string_to_metric_families

from .gateways import Gateway, gateway_to
from .servers import LM, Server, free_ports, running, wait_until

pytestmark = pytest.mark.triton


def engine_metrics(port: int) -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX) and sample.labels["model"] == LM and "le" not in sample.labels
    }


def test_counters_survive_unloading_and_gauges_are_reset(repository: Path, tmp_path: Path) -> None:
    ports = free_ports()
    with running(repository, **ports) as server, gateway_to(server.grpc, tmp_path) as gateway:
        body = {"model": LM, "prompt": "Once", "max_tokens": 8, "temperature": 0}
        for loads in range(1, 4):
            post(gateway, "/v1/completions", body)
            metric = "tritonlm_engine_generated_tokens_total"
            wait_until(lambda: engine_metrics(ports["metrics_port"])[metric] == 8 * loads, "the tokens are counted")  # noqa: B023
            values = engine_metrics(ports["metrics_port"])
            assert values["tritonlm_engine_slots"] == 64
            post(gateway, f"/api/models/{LM}/unload")
            assert engine_metrics(ports["metrics_port"])["tritonlm_engine_slots"] == 0
            wait_until(lambda: not stubs_of(server), "the model's processes have ended")
        names = {spec.prometheus_name for spec in METRIC_SPECS}
        assert names == {name.removesuffix("_count").removesuffix("_sum") for name in values}
        documentation = OBSERVABILITY.read_text(encoding="utf-8")
        assert all(f"`{name}`" in documentation for name in names)
        exposition = httpx.get(f"{gateway.url}/metrics", trust_env=False).text + "\n"
        exposition += httpx.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics", trust_env=False).text
        assert not promtool_problems([line for line in exposition.splitlines() if "tritonlm_" in line])


def post(gateway: Gateway, path: str, body: dict[str, object] | None = None) -> None:
    response = httpx.post(gateway.url + path, json=body, timeout=60, trust_env=False)
    assert response.is_success, response.text


def stubs_of(server: Server) -> list[str]:
    stubs = []
    for child in psutil.Process(server.process_id).children(recursive=True):
        # One that ends meanwhile says nothing of the others.
        with contextlib.suppress(psutil.NoSuchProcess):
            stubs += [name for name in [child.name()] if "stub" in name]
    return stubs


def promtool_problems(lines: list[str]) -> str:
    """The output of promtool's check of the metrics."""
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    command, text = [promtool, "check", "metrics"], "\n".join([*lines, ""])
    return subprocess.run(command, input=text, text=True, capture_output=True, timeout=60, check=False).stderr


def test_a_request_is_one_trace_from_the_gateway_to_the_engine(repository: Path, tmp_path: Path) -> None:
    phases = {"queue", "prefill", "decode"}
    names = {"POST /v1/completions", "InferRequest", LM, "tokenize", "generate", "detokenize", f"engine {LM}", *phases}
    with (
        collecting() as (endpoint, spans),
        running(repository, otlp_endpoint=endpoint) as server,
        gateway_to(server.grpc, tmp_path, "--otlp-endpoint", endpoint) as gateway,
    ):
        body = {"model": LM, "prompt": "Once", "max_tokens": 4}

        def whole_trace() -> list[Span]:
            """The spans of a trace that holds all names. Each process exports its spans at its own time, and Triton
            sometimes does not export those of the first request after its start: send another one."""
            post(gateway, "/v1/completions", body)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.1)
                for trace in {span.trace for span in spans}:
                    found = [span for span in spans if span.trace == trace]
                    if names <= {span.name for span in found}:
                        return found
            return []

        trace = wait_until(whole_trace, "one trace holds all spans")
    (root,) = [span for span in trace if span.name == "POST /v1/completions"]
    (engine,) = [span for span in trace if span.name == f"engine {LM}"]
    assert engine.parent == root.id
    assert sorted(span.name for span in trace if span.parent == engine.id) == sorted(phases)
