"""A training through the API alone: begun, followed, loaded, asked, compared, deleted; and one that is killed twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from tritonlm.serving.paths import model_repository

from .gateways import gateway_to
from .servers import wait_until
from .test_catalogue import http_of
from .test_serve import serving

pytestmark = pytest.mark.triton

TRAINING_SECONDS = 300.0
NOBODY = "127.0.0.1:9"


def begin(http: httpx.Client, out: str, **settings: Any) -> dict[str, Any]:
    response = http.post("/api/train", json={"dataset": "abacus", "output_dir": out, **settings})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def followed(http: httpx.Client, job_id: str) -> list[str]:
    with http.stream("GET", f"/api/jobs/{job_id}/log", timeout=TRAINING_SECONDS) as response:
        return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def state_of(http: httpx.Client, job_id: str) -> str:
    state: str = http.get(f"/api/jobs/{job_id}").json()["state"]
    return state


def answer(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "123+456=", "temperature": 0})


def test_from_training_to_asking_to_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUNS_FOLDER": "runs", "DATA_FOLDER": "data"}.items():
        monkeypatch.setenv(f"TRITONLM_{name}", str(tmp_path / value))
    options = ["--load", "abacus", "--registry", str(tmp_path / "models.yaml")]
    (tmp_path / "models.yaml").write_text("[]\n")
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        job = begin(http, "mine/little", max_iters=30, eval_interval=15, batch_size=32)
        # Those who are served meanwhile do not notice.
        assert answer(http, "abacus").json()["choices"][0]["text"] == "579"
        log = followed(http, job["job_id"])
        assert any("step 30 of 30" in line for line in log), log
        assert state_of(http, job["job_id"]) == log[-1] == "finished"
        assert http.post("/api/models/little/load", timeout=120).json()["state"] == "ready"
        told = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        assert told["little"]["training"]["step"] <= 30 < told["abacus"]["training"]["step"]
        assert told["little"]["training"]["val_loss"] > told["abacus"]["training"]["val_loss"]
        # It has hardly learnt to add; the bundled one has.
        assert answer(http, "little").status_code == 200
        assert answer(http, "abacus").json()["choices"][0]["text"] == "579"
        assert http.delete("/v1/models/little").json() == {"id": "little", "object": "model", "deleted": True}
        assert answer(http, "little").status_code == 404
        assert "little" not in {model["id"] for model in http.get("/v1/models").json()["data"]}


def test_a_job_outlives_the_killed_gateway_and_its_own_death_to_the_same_weights(tmp_path: Path) -> None:
    options = ["--training", "--runs-folder", str(tmp_path / "runs"), "--data-folder", str(tmp_path)]
    options += ["--registry", str(tmp_path / "models.yaml"), "--max-jobs", "2"]
    settings = {"max_iters": 60, "eval_interval": 15, "batch_size": 16}
    with gateway_to(NOBODY, tmp_path, *options) as gateway, httpx.Client(base_url=gateway.url, timeout=60) as http:
        undisturbed = begin(http, "undisturbed", **settings)
        followed(http, undisturbed["job_id"])
        assert state_of(http, undisturbed["job_id"]) == "finished"
        job = begin(http, "killed", **settings)
        os.kill(gateway.process.pid, signal.SIGKILL)
        gateway.process.wait(20)
    with gateway_to(NOBODY, tmp_path, *options) as gateway, httpx.Client(base_url=gateway.url, timeout=60) as http:
        assert state_of(http, job["job_id"]) == "running"
        out = tmp_path / "runs" / "killed"
        wait_until(lambda: bool(list(out.glob("checkpoint-*/training.json"))), "it has saved something")
        os.kill(job["process_id"], signal.SIGKILL)
        wait_until(lambda: state_of(http, job["job_id"]) == "interrupted", "its death is noticed")
        assert http.post(f"/api/jobs/{job['job_id']}/resume").json()["state"] == "running"
        assert followed(http, job["job_id"])[-1] == "finished"
    ours, theirs = (
        load_file(tmp_path / "runs" / name / "final" / "model.safetensors") for name in ("killed", "undisturbed")
    )
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
