"""Every query of the dashboard and the alerts returns data from a real Prometheus that scrapes a real server."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from contract_tables import ROOT
from ruamel.yaml import YAML
from tritonlm.serving.paths import model_repository

from .servers import WAIT_SECONDS, free_ports, wait_until
from .test_serve import Serve, serving

pytestmark = pytest.mark.triton

DOCKER = ROOT / "docker"
# Several times the scrape interval of one second.
RATE = "20s"
SUM = {"model": "abacus", "prompt": "1+1=", "max_tokens": 4, "temperature": 0}
STORY = {"model": "fable", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}


def queries() -> dict[str, str]:
    """All queries by name. An alert's query is returned without its threshold, so that it always has a value."""
    result = {}
    board = json.loads((DOCKER / "grafana" / "dashboards" / "tritonlm.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            result[f"{panel['title']}: {target['legendFormat']}"] = target["expr"].replace("$__rate_interval", RATE)
    rules = YAML(typ="safe").load(DOCKER / "prometheus" / "alerts.yml")["groups"][0]["rules"]
    for rule in rules:
        value = re.sub(r"\s(>|==) [\d.]+", "", rule["expr"])
        result[f"alert {rule['alert']}"] = re.sub(r"\[\d+m\]", f"[{RATE}]", value)
    return result


@contextlib.contextmanager
def prometheus(serve: Serve, folder: Path) -> Iterator[httpx.Client]:
    if not (binary := shutil.which("prometheus")):
        pytest.skip("Prometheus is not installed (Debian: prometheus)")
    settings = YAML(typ="safe").load(DOCKER / "prometheus" / "prometheus.yml")
    settings["global"]["scrape_interval"] = settings["global"]["evaluation_interval"] = "1s"
    settings["rule_files"] = [str(DOCKER / "prometheus" / "alerts.yml")]
    ports = {"tritonlm-gateway": serve.ports["port"], "tritonlm-triton": serve.ports["metrics_port"]}
    for job in settings["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
        job.pop("authorization", None)
    file, port = folder / "prometheus.yml", free_ports()["port"]
    YAML(typ="safe").dump(settings, file)
    command = [
        binary, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS, trust_env=False) as http:
            wait_until(lambda: is_ready(http), "Prometheus is ready")
            yield http
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def is_ready(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return http.get("/-/ready").is_success
    return False


def run_query(http: httpx.Client, query: str) -> list[Any]:
    response = http.get("/api/v1/query", params={"query": query}).json()
    assert response["status"] == "success", (query, response)
    series: list[Any] = response["data"]["result"]
    return series


def send_traffic(http: httpx.Client) -> None:
    """Requests that change every counter."""
    story = {**STORY, "stream": False}
    with ThreadPoolExecutor(16) as pool:
        # More than the limit of concurrent requests: some are refused.
        list(pool.map(lambda _: http.post("/v1/completions", json=story), range(16)))
    http.post("/v1/completions", json=SUM, headers={"x-stainless-retry-count": "1"}).raise_for_status()
    http.post("/v1/completions", json={**SUM, "temperature": "hot"})
    http.post("/v1/embeddings", json={"model": "abacus", "input": "x"})
    http.post("/v1/completions", json=STORY).raise_for_status()


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def kill_an_engine_during_a_stream(serve: Serve, http: httpx.Client) -> None:
    """The stream is resumed and ends normally."""
    # Found before the stream begins, which may be short.
    (engine,) = (
        process
        for process in psutil.Process(serve.process.pid).children(recursive=True)
        if "fable-generate_0_0" in cmdline(process)
    )
    with http.stream("POST", "/v1/completions", json=STORY) as response:
        lines = response.iter_lines()
        next(lines)
        engine.send_signal(signal.SIGKILL)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_all_queries_return_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_MAX_REQUESTS", "4")
    with (
        serving(model_repository(), tmp_path) as serve,
        prometheus(serve, tmp_path) as prometheus_http,
        httpx.Client(base_url=f"http://127.0.0.1:{serve.ports['port']}", timeout=60, trust_env=False) as http,
    ):
        http.post("/api/models/abacus/unload").raise_for_status()
        send_traffic(http)
        kill_an_engine_during_a_stream(serve, http)
        missing = queries()
        assert len(missing) > 50
        deadline = time.monotonic() + WAIT_SECONDS
        while missing and time.monotonic() < deadline:
            send_traffic(http)
            missing = {name: query for name, query in missing.items() if not run_query(prometheus_http, query)}
        assert not missing
        rules = prometheus_http.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}
