"""Every query of the dashboard and of the alerts, asked of a real Prometheus that watches a real server at work."""

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
# Long enough for several looks of a Prometheus that looks every second.
RATE = "20s"
ASK = {"model": "abacus", "prompt": "1+1=", "max_tokens": 4, "temperature": 0}
STORY = {"model": "fable", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}


def queries() -> dict[str, str]:
    """By what they are for. Of an alert's, without the bound: there is something to compare."""
    found = {}
    board = json.loads((DOCKER / "grafana" / "dashboards" / "tritonlm.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']}: {target['legendFormat']}"] = target["expr"].replace("$__rate_interval", RATE)
    rules = YAML(typ="safe").load(DOCKER / "prometheus" / "alerts.yml")["groups"][0]["rules"]
    for rule in rules:
        unbound = re.sub(r"\s(>|==) [\d.]+", "", rule["expr"])
        found[f"alert {rule['alert']}"] = re.sub(r"\[\d+m\]", f"[{RATE}]", unbound)
    return found


@contextlib.contextmanager
def prometheus(serve: Serve, folder: Path) -> Iterator[httpx.Client]:
    if not (binary := shutil.which("prometheus")):
        pytest.skip("no Prometheus here (Debian: prometheus)")
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
            wait_until(lambda: answers(http), "Prometheus is ready")
            yield http
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def answers(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return http.get("/-/ready").is_success
    return False


def result(http: httpx.Client, query: str) -> list[Any]:
    told = http.get("/api/v1/query", params={"query": query}).json()
    assert told["status"] == "success", (query, told)
    found: list[Any] = told["data"]["result"]
    return found


def live(http: httpx.Client) -> None:
    """Something of everything that is counted."""
    story = {**STORY, "stream": False}
    with ThreadPoolExecutor(16) as crowd:
        # More at once than may be inside: some are refused.
        list(crowd.map(lambda _: http.post("/v1/completions", json=story), range(16)))
    http.post("/v1/completions", json=ASK, headers={"x-stainless-retry-count": "1"}).raise_for_status()
    http.post("/v1/completions", json={**ASK, "temperature": "hot"})
    http.post("/v1/embeddings", json={"model": "abacus", "input": "x"})
    http.post("/v1/completions", json=STORY).raise_for_status()


def kill_an_engine_in_the_midst(serve: Serve, http: httpx.Client) -> None:
    """Its stream goes on where it was."""
    with http.stream("POST", "/v1/completions", json=STORY) as answer:
        lines = answer.iter_lines()
        next(lines)
        for process in psutil.Process(serve.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "fable-generate_0_0" in process.cmdline():
                    process.send_signal(signal.SIGKILL)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_all_queries_have_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_MAX_REQUESTS", "4")
    with (
        serving(model_repository(), tmp_path) as serve,
        prometheus(serve, tmp_path) as watcher,
        httpx.Client(base_url=f"http://127.0.0.1:{serve.ports['port']}", timeout=60, trust_env=False) as http,
    ):
        http.post("/api/models/abacus/unload").raise_for_status()
        live(http)
        kill_an_engine_in_the_midst(serve, http)
        missing = queries()
        assert len(missing) > 50
        deadline = time.monotonic() + WAIT_SECONDS
        while missing and time.monotonic() < deadline:
            live(http)
            missing = {name: query for name, query in missing.items() if not result(watcher, query)}
        assert not missing
        rules = watcher.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}
