"""Training jobs over HTTP: small real trainings in their own processes, which survive a killed gateway."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonlm.cli import app
from tritonlm.contract.adapters_file import AdapterEntry, adapters_file, read_adapters
from tritonlm.gateway.models.training import _lines_from
from tritonlm.jobs import Job, JobManager, JobStore
from tritonlm.serving.registry import read_registry
from tritonlm.training.plan import make_plan
from typer.testing import CliRunner, Result

from .conftest import Gateway, running_gateway

SMALL = {"dataset": "abacus", "batch_size": 8, "max_iters": 6, "eval_interval": 3, "learning_rate": 1e-3}
WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jobs")
    (root / "data").mkdir()
    (root / "data" / "letters.txt").write_text("abc def ghi\n\n" * 50)
    row = {"messages": [{"role": "user", "content": "Tell me a story"}, {"role": "assistant", "content": "No."}]}
    (root / "data" / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    return root


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    settings = {"runs_folder": folder / "runs", "data_folder": folder / "data", "registry": folder / "models.yaml"}
    with running_gateway(training=True, adapters_folder=folder / "adapters", **settings) as running:
        yield running


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def test_a_training_request_results_in_a_registered_model(gateway: Gateway, folder: Path) -> None:
    config = {**SMALL, "output_dir": "out/small_abacus"}
    response = gateway.post("/api/train", **config)
    assert response.status_code == 200, response.text
    started = response.json()
    assert started["message"] == "Training started"
    assert started["config"] == config
    assert started["process_id"] > 0
    lines, state = follow_log(gateway, started["job_id"])
    assert state == "finished", lines
    assert any("step 6 of 6" in line for line in lines)
    (job,) = [job for job in gateway.http.get("/api/jobs").json()["jobs"] if job["id"] == started["job_id"]]
    assert job == gateway.http.get(f"/api/jobs/{started['job_id']}").json()
    assert (job["name"], job["state"], job["error"]) == ("small_abacus", "finished", None)
    assert job["created"] <= job["started"] <= job["ended"]
    assert json.loads(Path(started["config_path"]).read_text())["steps"] == 6
    (entry,) = read_registry(folder / "models.yaml")
    assert entry.name == "small_abacus"
    assert (entry.path or Path()) == (folder / "runs" / "out" / "small_abacus" / "final").resolve()
    # An existing model is not overwritten.
    assert refused_field(gateway, **config) == "output_dir"
    # Only a model trained here can be deleted; its files stay.
    deleted = gateway.http.delete("/v1/models/small_abacus").json()
    assert deleted == {"id": "small_abacus", "object": "model", "deleted": True}
    assert read_registry(folder / "models.yaml") == []
    assert (folder / "runs" / "out" / "small_abacus" / "final" / "model.safetensors").is_file()
    assert gateway.http.delete("/v1/models/small_abacus").status_code == 404
    assert gateway.http.delete("/v1/models/abacus").status_code == 400


def test_an_adapter_is_added_to_its_base(gateway: Gateway, folder: Path) -> None:
    config = {
        "dataset": "chats.jsonl", "output_dir": "out/refusing", "model_type": "fable", "batch_size": 4, "max_iters": 4,
        "eval_interval": 2, "context": 64, "packing": True, "lora": {"rank": 2, "targets": ["c_attn"]},
    }  # fmt: skip
    response = gateway.post("/api/train", **config)
    assert response.status_code == 200, response.text
    lines, state = follow_log(gateway, response.json()["job_id"])
    assert state == "finished", lines
    final = (folder / "runs" / "out" / "refusing" / "final").resolve()
    assert json.loads((final / "adapter_config.json").read_text())["r"] == 2
    file = adapters_file(folder / "adapters", "fable")
    assert read_adapters(file) == {"refusing": AdapterEntry(str(final))}
    # It is no language model of its own, and its name is taken.
    registry = folder / "models.yaml"
    assert not registry.exists() or read_registry(registry) == []
    assert refused_field(gateway, **config) == "output_dir"
    assert refused_field(gateway, **{**config, "output_dir": "other/refusing"}) == "output_dir"
    deleted = gateway.http.delete("/v1/models/refusing").json()
    assert deleted == {"id": "refusing", "object": "model", "deleted": True}
    assert read_adapters(file) == {}
    assert (final / "adapter_model.safetensors").is_file()


def follow_log(gateway: Gateway, job_id: str) -> tuple[list[str], str]:
    """A job's log, and the state in its last event."""
    lines: list[str] = []
    with gateway.http.stream("GET", f"/api/jobs/{job_id}/log", timeout=WAIT_SECONDS) as response:
        event = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event == "done":
                return lines, line.removeprefix("data: ")
            elif line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
    raise AssertionError("the log ended without the job's state")


def refused_field(gateway: Gateway, **body: Any) -> str:
    response = gateway.post("/api/train", **body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error"), response.text
    return str(error["param"])


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"output_dir": "../outside"}, "output_dir"),
        ({"output_dir": "/tmp/outside"}, "output_dir"),
        ({"output_dir": "a/../.."}, "output_dir"),
        ({"output_dir": "."}, "output_dir"),
        ({"output_dir": "out/has space"}, "output_dir"),
        ({"output_dir": "out/abacus"}, "output_dir"),
        ({"output_dir": "out/x\u0000y"}, "output_dir"),
        ({"dataset": "shakesphere"}, "dataset"),
        ({"dataset": "../models.yaml"}, "dataset"),
        ({"dataset": "/etc/passwd"}, "dataset"),
        ({"model_type": "gpt9"}, "model_type"),
        ({"model_type": "../x"}, "model_type"),
        ({"max_iters": 10**9}, "max_iters"),
        ({"batch_size": 0}, "batch_size"),
        ({"dataset": "fable", "batch_size": 65_536}, "batch_size"),
        ({"learning_rate": 2}, "learning_rate"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"lora": {}}, "lora"),
        ({"lora": {}, "model_type": "fable"}, "lora"),
        ({"lora": {"rank": 0}, "model_type": "fable", "dataset": "letters.txt"}, "lora.rank"),
        ({"lora": {"size": 2}, "model_type": "fable", "dataset": "letters.txt"}, "lora.size"),
        ({"context": 4}, "context"),
    ],
)
def test_invalid_configs_are_refused_before_a_job_starts(
    gateway: Gateway, folder: Path, changed: dict[str, Any], param: str
) -> None:
    before = len(gateway.http.get("/api/jobs").json()["jobs"])
    assert refused_field(gateway, **{**SMALL, "output_dir": "out/refused", **changed}) == param
    assert len(gateway.http.get("/api/jobs").json()["jobs"]) == before
    assert not (folder / "runs" / "out" / "refused").exists()


def test_a_base_that_the_registry_lacks_is_refused_with_the_remedy(gateway: Gateway) -> None:
    answer = gateway.post("/api/train", **SMALL, output_dir="out/refused", model_type="named-at-the-start")
    assert "(abacus, fable); add one that was named when the server started with tritonlm add" in answer.text


def test_one_job_runs_the_next_is_queued_and_both_can_be_cancelled(gateway: Gateway) -> None:
    long = {**SMALL, "max_iters": 100_000}
    first = gateway.post("/api/train", **long, output_dir="out/first").json()
    second = gateway.post("/api/train", **{**long, "dataset": "letters.txt"}, output_dir="out/second").json()
    assert (second["message"], second["process_id"]) == ("Training queued", None)
    # The names of unfinished jobs are taken, too.
    assert refused_field(gateway, **long, output_dir="out/second") == "output_dir"
    for job in (second, first):
        cancelled = gateway.post(f"/api/jobs/{job['job_id']}/cancel").json()
        assert cancelled["state"] == "cancelled"
    assert gateway.post(f"/api/jobs/{first['job_id']}/cancel").status_code == 400
    with pytest.raises(ProcessLookupError):
        os.kill(first["process_id"], 0)


def test_unknown_jobs_get_404_and_a_server_without_training_501(gateway: Gateway) -> None:
    for method, path in (("GET", "nothing"), ("GET", "nothing/log"), ("POST", "nothing/cancel")):
        assert gateway.http.request(method, f"/api/jobs/{path}").status_code == 404
    with running_gateway() as other:
        for response in (other.http.get("/api/jobs"), other.post("/api/train", **SMALL, output_dir="x")):
            assert (response.status_code, response.json()["error"]["code"]) == (501, "not_implemented")


def submit(manager: JobManager, out: Path, **changed: Any) -> Job:
    # A larger model's evaluations of the held-out sums take longer than these trainings.
    sizes = {"layers": 1, "width": 32, "heads": 2}
    values = {"steps": 12, "batch_size": 8, "eval_steps": 12, "threads": 1, "sizes": sizes, **changed}
    plan = make_plan(data="abacus", out=out, **values)
    return manager.add(out.name, out, {}, plan.model_dump(mode="json"))


def test_a_job_outlives_its_manager_and_the_next_one_continues_it(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    started = submit(JobManager(store), tmp_path / "mine")
    assert started.state == "running"
    # As after kill -9: the next manager knows only the stored list.
    manager = JobManager(JobStore(tmp_path / "jobs.sqlite"))
    manager.poll()
    assert manager.get(started.id).state == "running"
    wait_until(lambda: (manager.poll(), manager.get(started.id).state)[1] == "finished")
    assert (tmp_path / "mine" / "final" / "model.safetensors").is_file()


def test_a_killed_job_is_interrupted_and_can_be_resumed(tmp_path: Path) -> None:
    manager = JobManager(JobStore(tmp_path / "jobs.sqlite"))
    started = submit(manager, tmp_path / "mine", steps=200, eval_steps=40)
    wait_until(lambda: bool(list((tmp_path / "mine").glob("checkpoint-*/training.json"))))
    os.kill(started.process_id or 0, signal.SIGKILL)
    wait_until(lambda: (manager.poll(), manager.get(started.id).state)[1] == "interrupted")
    assert manager.resume(started.id).state == "running"
    wait_until(lambda: (manager.poll(), manager.get(started.id).state)[1] == "finished")
    assert "step 200 of 200" in started.log.read_text()


def test_a_closing_manager_interrupts_its_jobs(tmp_path: Path) -> None:
    manager = JobManager(JobStore(tmp_path / "jobs.sqlite"))
    started = submit(manager, tmp_path / "mine", steps=100_000)
    manager.close()
    assert manager.get(started.id).state == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(started.process_id or 0, 0)


def test_a_log_is_read_in_blocks_of_complete_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert _lines_from(log, 0) == ([], 0, False)
    written = [f"line {number} é" for number in range(20_000)]
    log.write_text("\n".join([*written, "incomplete line"]), encoding="utf-8")
    read, offset, more = [], 0, True
    while more:
        lines, offset, more = _lines_from(log, offset)
        read += lines
    assert read == written


def test_nothing_is_written_before_the_first_job_and_a_job_that_cannot_start_fails(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "runs" / "jobs.sqlite")
    manager = JobManager(store)
    manager.poll()
    assert manager.all() == []
    assert list(tmp_path.iterdir()) == []
    # A file is in the way of the folder.
    (tmp_path / "taken").write_text("")
    assert submit(manager, tmp_path / "taken" / "mine").state == "failed"
    assert "cannot be started" in (manager.all()[0].error or "")


def test_a_failed_job_has_an_error_message(tmp_path: Path) -> None:
    manager = JobManager(JobStore(tmp_path / "jobs.sqlite"))
    plan = make_plan(data=str(tmp_path / "short.txt"), out=tmp_path / "mine").model_dump(mode="json")
    (tmp_path / "short.txt").write_text("x")
    job = manager.add("mine", tmp_path / "mine", {}, plan)
    wait_until(lambda: (manager.poll(), manager.get(job.id).state)[1] == "failed")
    assert "too little text" in (manager.get(job.id).error or "")


def test_the_command_line_lists_follows_and_changes_jobs(gateway: Gateway) -> None:
    def tritonlm(*words: str) -> Result:
        return CliRunner().invoke(app, ["jobs", "--url", gateway.url, *words])

    # Its evaluations take less time than those of all held-out sums.
    config = {**SMALL, "dataset": "letters.txt"}
    started = gateway.post("/api/train", **config, output_dir="out/by_command").json()["job_id"]
    followed_log = tritonlm("logs", started, "-f")
    assert followed_log.exit_code == 0, followed_log.output
    assert "step 6 of 6" in followed_log.stdout
    assert "step 6 of 6" in tritonlm("logs", started).stdout
    listed = json.loads(tritonlm("--json").stdout)
    assert {"by_command": "finished"}.items() <= {job["name"]: job["state"] for job in listed}.items()
    assert started in tritonlm().stdout
    long = gateway.post("/api/train", **{**config, "max_iters": 100_000}, output_dir="out/long").json()["job_id"]
    assert "cancelled" in tritonlm("cancel", long).stdout
    assert tritonlm("logs", long, "-f").exit_code == 1
    assert "running" in tritonlm("resume", long).stdout
    assert "cancelled" in tritonlm("cancel", long).stdout
    for words, code in ((("cancel", long), 2), (("logs", "nothing"), 2)):
        refused_one = tritonlm(*words)
        assert refused_one.exit_code == code
        assert refused_one.stderr.startswith("error: ")
    unreachable = CliRunner().invoke(app, ["jobs", "--url", "http://127.0.0.1:9"])
    assert (unreachable.exit_code, unreachable.stderr) == (3, "error: no gateway answers at http://127.0.0.1:9\n")
