"""Training jobs over HTTP: real trainings, small ones, in processes of their own; kept whatever is killed."""

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
from tritonlm.gateway.training import _lines_from
from tritonlm.jobs import Job, JobKeeper, JobStore
from tritonlm.serving.registry import read_registry
from tritonlm.training.plan import make_plan
from typer.testing import CliRunner, Result

from .conftest import Gateway, running_gateway

SMALL = {"dataset": "abacus", "batch_size": 8, "max_iters": 6, "eval_interval": 3, "learning_rate": 1e-3}
WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("jobs")
    (found / "data").mkdir()
    (found / "data" / "letters.txt").write_text("abc def ghi\n\n" * 50)
    return found


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    settings = {"runs_folder": folder / "runs", "data_folder": folder / "data", "registry": folder / "models.yaml"}
    with running_gateway(training=True, **settings) as found:
        yield found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_training_from_its_request_to_a_model_that_can_be_loaded(gateway: Gateway, folder: Path) -> None:
    asked = {**SMALL, "output_dir": "out/small_abacus"}
    begun = gateway.post("/api/train", **asked)
    assert begun.status_code == 200, begun.text
    found = begun.json()
    assert found["message"] == "Training started"
    assert found["config"] == asked
    assert found["process_id"] > 0
    lines, ended = followed(gateway, found["job_id"])
    assert ended == "finished", lines
    assert any("step 6 of 6" in line for line in lines)
    (job,) = [job for job in gateway.http.get("/api/jobs").json()["jobs"] if job["id"] == found["job_id"]]
    assert job == gateway.http.get(f"/api/jobs/{found['job_id']}").json()
    assert (job["name"], job["state"], job["error"]) == ("small_abacus", "finished", None)
    assert job["created"] <= job["started"] <= job["ended"]
    assert json.loads(Path(found["config_path"]).read_text())["steps"] == 6
    (entry,) = read_registry(folder / "models.yaml")
    assert entry.name == "small_abacus"
    assert (entry.path or Path()) == (folder / "runs" / "out" / "small_abacus" / "final").resolve()
    # What is there is not written over.
    assert refused(gateway, **asked) == "output_dir"
    # Only what was trained here can be deleted; its files stay.
    gone = gateway.http.delete("/v1/models/small_abacus").json()
    assert gone == {"id": "small_abacus", "object": "model", "deleted": True}
    assert read_registry(folder / "models.yaml") == []
    assert (folder / "runs" / "out" / "small_abacus" / "final" / "model.safetensors").is_file()
    assert gateway.http.delete("/v1/models/small_abacus").status_code == 404
    assert gateway.http.delete("/v1/models/abacus").status_code == 400


def followed(gateway: Gateway, job_id: str) -> tuple[list[str], str]:
    """A job's log, and the state that its last event tells."""
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
    raise AssertionError("the log ended without telling how the job did")


def refused(gateway: Gateway, **body: Any) -> str:
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
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    gateway: Gateway, folder: Path, changed: dict[str, Any], param: str
) -> None:
    before = len(gateway.http.get("/api/jobs").json()["jobs"])
    assert refused(gateway, **{**SMALL, "output_dir": "out/refused", **changed}) == param
    assert len(gateway.http.get("/api/jobs").json()["jobs"]) == before
    assert not (folder / "runs" / "out" / "refused").exists()


def test_one_runs_and_the_next_waits_and_both_can_be_cancelled(gateway: Gateway) -> None:
    long = {**SMALL, "max_iters": 100_000}
    first = gateway.post("/api/train", **long, output_dir="out/first").json()
    second = gateway.post("/api/train", **{**long, "dataset": "letters.txt"}, output_dir="out/second").json()
    assert (second["message"], second["process_id"]) == ("Training queued", None)
    # Neither has a folder of its own yet, or is done; their names are taken all the same.
    assert refused(gateway, **long, output_dir="out/second") == "output_dir"
    for job in (second, first):
        cancelled = gateway.post(f"/api/jobs/{job['job_id']}/cancel").json()
        assert cancelled["state"] == "cancelled"
    assert gateway.post(f"/api/jobs/{first['job_id']}/cancel").status_code == 400
    with pytest.raises(ProcessLookupError):
        os.kill(first["process_id"], 0)


def test_unknown_jobs_and_a_server_that_does_not_train(gateway: Gateway) -> None:
    for method, path in (("GET", "nothing"), ("GET", "nothing/log"), ("POST", "nothing/cancel")):
        assert gateway.http.request(method, f"/api/jobs/{path}").status_code == 404
    with running_gateway() as other:
        for response in (other.http.get("/api/jobs"), other.post("/api/train", **SMALL, output_dir="x")):
            assert (response.status_code, response.json()["error"]["code"]) == (501, "not_implemented")


def begin(keeper: JobKeeper, out: Path, **changed: Any) -> Job:
    values = {"steps": 12, "batch_size": 8, "eval_steps": 4, "threads": 1, **changed}
    plan = make_plan(data="abacus", out=out, **values)
    return keeper.add(out.name, out, {}, plan.model_dump(mode="json"))


def test_a_job_outlives_its_keeper_and_the_next_one_finds_it(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    begun = begin(JobKeeper(store), tmp_path / "mine")
    assert begun.state == "running"
    # As after kill -9: the next keeper knows the list alone.
    keeper = JobKeeper(JobStore(tmp_path / "jobs.sqlite"))
    keeper.look()
    assert keeper.get(begun.id).state == "running"
    wait_until(lambda: (keeper.look(), keeper.get(begun.id).state)[1] == "finished")
    assert (tmp_path / "mine" / "final" / "model.safetensors").is_file()


def test_a_killed_job_is_found_interrupted_and_goes_on(tmp_path: Path) -> None:
    keeper = JobKeeper(JobStore(tmp_path / "jobs.sqlite"))
    begun = begin(keeper, tmp_path / "mine", steps=40)
    wait_until(lambda: bool(list((tmp_path / "mine").glob("checkpoint-*/training.json"))))
    os.kill(begun.process_id or 0, signal.SIGKILL)
    wait_until(lambda: (keeper.look(), keeper.get(begun.id).state)[1] == "interrupted")
    assert keeper.resume(begun.id).state == "running"
    wait_until(lambda: (keeper.look(), keeper.get(begun.id).state)[1] == "finished")
    assert "step 40 of 40" in begun.log.read_text()


def test_a_keeper_that_closes_ends_its_job_to_be_resumed(tmp_path: Path) -> None:
    keeper = JobKeeper(JobStore(tmp_path / "jobs.sqlite"))
    begun = begin(keeper, tmp_path / "mine", steps=100_000)
    keeper.close()
    assert keeper.get(begun.id).state == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(begun.process_id or 0, 0)


def test_a_log_is_read_in_parts_and_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert _lines_from(log, 0) == ([], 0, False)
    written = [f"line {number} é" for number in range(20_000)]
    log.write_text("\n".join([*written, "not yet whole"]), encoding="utf-8")
    read, place, more = [], 0, True
    while more:
        lines, place, more = _lines_from(log, place)
        read += lines
    assert read == written


def test_nothing_is_written_before_the_first_job_and_one_that_cannot_start_fails(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "runs" / "jobs.sqlite")
    keeper = JobKeeper(store)
    keeper.look()
    assert keeper.all() == []
    assert list(tmp_path.iterdir()) == []
    # Where the folder should come, a file lies.
    (tmp_path / "taken").write_text("")
    assert begin(keeper, tmp_path / "taken" / "mine").state == "failed"
    assert "cannot be started" in (keeper.all()[0].error or "")


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    keeper = JobKeeper(JobStore(tmp_path / "jobs.sqlite"))
    plan = make_plan(data=str(tmp_path / "short.txt"), out=tmp_path / "mine").model_dump(mode="json")
    (tmp_path / "short.txt").write_text("x")
    job = keeper.add("mine", tmp_path / "mine", {}, plan)
    wait_until(lambda: (keeper.look(), keeper.get(job.id).state)[1] == "failed")
    assert "too little text" in (keeper.get(job.id).error or "")


def test_the_command_line_lists_follows_and_changes_jobs(gateway: Gateway) -> None:
    def tritonlm(*words: str) -> Result:
        return CliRunner().invoke(app, ["jobs", "--url", gateway.url, *words])

    begun = gateway.post("/api/train", **{**SMALL, "output_dir": "out/by_command"}).json()["job_id"]
    followed_log = tritonlm("logs", begun, "-f")
    assert followed_log.exit_code == 0, followed_log.output
    assert "step 6 of 6" in followed_log.stdout
    assert "step 6 of 6" in tritonlm("logs", begun).stdout
    listed = json.loads(tritonlm("--json").stdout)
    assert {"by_command": "finished"}.items() <= {job["name"]: job["state"] for job in listed}.items()
    assert begun in tritonlm().stdout
    long = gateway.post("/api/train", **{**SMALL, "max_iters": 100_000, "output_dir": "out/long"}).json()["job_id"]
    assert "cancelled" in tritonlm("cancel", long).stdout
    assert tritonlm("logs", long, "-f").exit_code == 1
    assert "running" in tritonlm("resume", long).stdout
    assert "cancelled" in tritonlm("cancel", long).stdout
    for words, code in ((("cancel", long), 2), (("logs", "nothing"), 2)):
        refused_one = tritonlm(*words)
        assert refused_one.exit_code == code
        assert refused_one.stderr.startswith("error: ")
    nobody = CliRunner().invoke(app, ["jobs", "--url", "http://127.0.0.1:9"])
    assert (nobody.exit_code, nobody.stderr) == (3, "error: no gateway answers at http://127.0.0.1:9\n")
