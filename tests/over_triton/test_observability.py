"""Metrics, logs and traces of a real Triton: what the documents list is there, and one request is one trace."""

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
from engine.monitoring.metrics import MEASURES, PREFIX
from fakes.collector import collecting
from prometheus_client.parser import text_string_to_metric_families

from .gateways import gateway_to
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


def test_metrics_outlive_their_model_and_their_model_does_not_outlive_itself(repository: Path, tmp_path: Path) -> None:
    ports = free_ports()
    with running(repository, **ports) as server, gateway_to(server.grpc, tmp_path) as gateway:
        ask = {"model": LM, "prompt": "Once", "max_tokens": 8, "temperature": 0}
        for loads in range(1, 4):
            httpx.post(f"{gateway.url}/v1/completions", json=ask, timeout=60, trust_env=False).raise_for_status()
            metric = "tritonlm_engine_generated_tokens_total"
            wait_until(lambda: engine_metrics(ports["metrics_port"])[metric] == 8 * loads, "it is counted")  # noqa: B023
            found = engine_metrics(ports["metrics_port"])
            assert found["tritonlm_engine_places"] == 64
            httpx.post(f"{gateway.url}/api/models/{LM}/unload", timeout=60, trust_env=False).raise_for_status()
            assert engine_metrics(ports["metrics_port"])["tritonlm_engine_places"] == 0
            wait_until(lambda: not stubs_of(server), "the model's processes have ended")
        named = {measure.published_name for measure in MEASURES}
        assert named == {name.removesuffix("_count").removesuffix("_sum") for name in found}
        told = OBSERVABILITY.read_text(encoding="utf-8")
        assert all(f"`{name}`" in told for name in named)
        both = httpx.get(f"{gateway.url}/metrics", trust_env=False).text + "\n"
        both += httpx.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics", trust_env=False).text
        assert not complaints([line for line in both.splitlines() if "tritonlm_" in line])


def stubs_of(server: Server) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(server.process_id).children(recursive=True)
        return [child.name() for child in children if "stub" in child.name()]
    return []


def complaints(exposition: list[str]) -> str:
    """What Prometheus' own checker says of the names."""
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not here (Debian: prometheus)")
    command, text = [promtool, "check", "metrics"], "\n".join([*exposition, ""])
    return subprocess.run(command, input=text, text=True, capture_output=True, timeout=60, check=False).stderr


def test_a_request_is_one_trace_from_the_gateway_to_the_engine(repository: Path, tmp_path: Path) -> None:
    with (
        collecting() as (endpoint, spans),
        running(repository, otlp_endpoint=endpoint) as server,
        gateway_to(server.grpc, tmp_path, "--otlp-endpoint", endpoint) as gateway,
    ):
        ask = {"model": LM, "prompt": "Once", "max_tokens": 4}

        def all_came() -> bool:
            """Triton itself now and then keeps the spans of the first request after its start to itself."""
            httpx.post(f"{gateway.url}/v1/completions", json=ask, timeout=60, trust_env=False).raise_for_status()
            came, deadline = False, time.monotonic() + 10
            while not came and time.monotonic() < deadline:
                time.sleep(0.1)
                came = {"POST /v1/completions", "decode", LM} <= {span.name for span in spans}
            return came

        wait_until(all_came, "all spans came")
        traces = {span.trace for span in spans if span.name == LM}
        root = next(span for span in spans if span.name == "POST /v1/completions" and span.trace in traces)
        (engine,) = [span for span in spans if span.name == f"engine {LM}" and span.trace == root.trace]
        phases = [span.name for span in spans if span.parent == engine.id]
        tritons = {span.name for span in spans if span.trace == root.trace and span.parent != engine.id}
    assert engine.parent == root.id
    assert sorted(phases) == ["decode", "prefill", "queue"]
    assert {"InferRequest", LM, "tokenize", "generate", "detokenize"} <= tritons
