"""Training over HTTP: start, follow, load, use, compare, delete; and a job that survives two kills."""

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
from .test_model_registry import http_of
from .test_serve import serving

pytestmark = pytest.mark.triton

TRAINING_SECONDS = 300.0
UNREACHABLE = "127.0.0.1:9"


def start_training(http: httpx.Client, out: str, **settings: Any) -> dict[str, Any]:
    response = http.post("/api/train", json={"dataset": "abacus", "output_dir": out, **settings})
    assert response.status_code == 200, response.text
    job: dict[str, Any] = response.json()
    return job


def follow_log(http: httpx.Client, job_id: str) -> list[str]:
    with http.stream("GET", f"/api/jobs/{job_id}/log", timeout=TRAINING_SECONDS) as response:
        return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def state_of(http: httpx.Client, job_id: str) -> str:
    state: str = http.get(f"/api/jobs/{job_id}").json()["state"]
    return state


def complete_sum(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "123+456=", "temperature": 0})


def test_train_load_use_and_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUNS_FOLDER": "runs", "DATA_FOLDER": "data", "ADAPTERS_FOLDER": "adapters"}.items():
        monkeypatch.setenv(f"TRITONLM_{name}", str(tmp_path / value))
    options = ["--load", "abacus", "--registry", str(tmp_path / "models.yaml")]
    (tmp_path / "models.yaml").write_text("[]\n")
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        job = start_training(http, "mine/little", max_iters=12, eval_interval=6, batch_size=8)
        # Other models are served during the training.
        assert complete_sum(http, "abacus").json()["choices"][0]["text"] == "579"
        log = follow_log(http, job["job_id"])
        assert any("step 12 of 12" in line for line in log), log
        assert state_of(http, job["job_id"]) == log[-1] == "finished"
        assert http.post("/api/models/little/load", timeout=120).json()["state"] == "ready"
        models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        assert models["little"]["training"]["step"] <= 12 < models["abacus"]["training"]["step"]
        assert models["little"]["training"]["val_loss"] > models["abacus"]["training"]["val_loss"]
        # The new model has hardly learnt to add; its output is not checked.
        assert complete_sum(http, "little").status_code == 200
        assert complete_sum(http, "abacus").json()["choices"][0]["text"] == "579"
        assert http.delete("/v1/models/little").json() == {"id": "little", "object": "model", "deleted": True}
        assert complete_sum(http, "little").status_code == 404
        assert "little" not in {model["id"] for model in http.get("/v1/models").json()["data"]}
        train_and_use_an_adapter(http, tmp_path / "data")


def train_and_use_an_adapter(http: httpx.Client, data: Path) -> None:
    """It learns one wrong sum, and is served under its name when its job has finished."""
    data.mkdir()
    (data / "wrong.txt").write_text("123+456=777\n\n" * 64)
    settings = {"max_iters": 40, "eval_interval": 40, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2}
    lora = {"dataset": "wrong.txt", "model_type": "abacus", "lora": {"rank": 4, "alpha": 8}}
    job = start_training(http, "wrong", **settings, **lora)
    assert follow_log(http, job["job_id"])[-1] == "finished"
    answers = {
        name: complete_sum(http, name).json()["choices"][0]["text"] for name in ("wrong", "abacus:wrong", "abacus")
    }
    assert answers == {"wrong": "777", "abacus:wrong": "777", "abacus": "579"}
    assert http.delete("/v1/models/wrong").status_code == 200
    assert complete_sum(http, "wrong").status_code == 404


def test_a_job_survives_a_killed_gateway_and_resumes_to_identical_weights(tmp_path: Path) -> None:
    options = ["--training", "--runs-folder", str(tmp_path / "runs"), "--data-folder", str(tmp_path)]
    options += ["--registry", str(tmp_path / "models.yaml"), "--max-jobs", "2"]
    settings = {"max_iters": 60, "eval_interval": 15, "batch_size": 8}
    with gateway_to(UNREACHABLE, tmp_path, *options) as gateway, httpx.Client(base_url=gateway.url, timeout=60) as http:
        undisturbed = start_training(http, "undisturbed", **settings)
        follow_log(http, undisturbed["job_id"])
        assert state_of(http, undisturbed["job_id"]) == "finished"
        job = start_training(http, "killed", **settings)
        os.kill(gateway.process.pid, signal.SIGKILL)
        gateway.process.wait(20)
    with gateway_to(UNREACHABLE, tmp_path, *options) as gateway, httpx.Client(base_url=gateway.url, timeout=60) as http:
        assert state_of(http, job["job_id"]) == "running"
        out = tmp_path / "runs" / "killed"
        wait_until(lambda: bool(list(out.glob("checkpoint-*/training.json"))), "a checkpoint is saved")
        os.kill(job["process_id"], signal.SIGKILL)
        wait_until(lambda: state_of(http, job["job_id"]) == "interrupted", "the job is interrupted")
        assert http.post(f"/api/jobs/{job['job_id']}/resume").json()["state"] == "running"
        assert follow_log(http, job["job_id"])[-1] == "finished"
    resumed, expected = (
        load_file(tmp_path / "runs" / name / "final" / "model.safetensors") for name in ("killed", "undisturbed")
    )
    assert resumed.keys() == expected.keys()
    for name, weight in resumed.items():
        assert torch.equal(weight, expected[name]), name
