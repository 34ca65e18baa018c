"""Trainings for real, but small: what they leave behind, and that a killed one ends as if it had not been killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tritonlm.cli import app
from tritonlm.contract import Checkpoint
from typer.testing import CliRunner

SMALL = (
    "--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "8", "--steps", "12", "--eval-steps", "4",
    "--warmup-steps", "2", "--threads", "1",
)  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tritonlm.cli", "train", *words]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=200, check=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "abacus"
    result = run("abacus", "--out", str(out), *SMALL)
    assert result.returncode == 0, result.stderr
    assert "step 12 of 12" in result.stderr
    return out


def test_a_training_leaves_a_checkpoint_a_record_and_a_report(undisturbed: Path) -> None:
    final = undisturbed / "final"
    Checkpoint(final).check()
    record: dict[str, Any] = json.loads((final / "training.json").read_text())
    assert (record["dataset"], record["batch_size"], record["seed"], record["steps"]) == ("abacus", 8, 0, 12)
    assert record["step"] in (4, 8, 12)
    assert record["val_loss"] > 0
    assert record["accuracy"] is not None
    assert record["parameters"] == sum(weight.numel() for weight in weights(final).values())
    assert (final / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "123+456=" in (final / "report.md").read_text()
    assert "perplexity" in (final / "README.md").read_text()
    assert not list(final.glob("*.bin"))


def test_every_checkpoint_can_be_served_the_moment_it_is_there(undisturbed: Path) -> None:
    found = [path for path in undisturbed.iterdir() if path.name.startswith("checkpoint-")]
    assert found
    for checkpoint in found:
        Checkpoint(checkpoint).check()
        assert json.loads((checkpoint / "training.json").read_text())["step"] == int(checkpoint.name.split("-")[1])


def test_a_killed_training_goes_on_to_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "abacus"
    process = subprocess.Popen(command("abacus", "--out", str(out), *SMALL), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoint-*/training.json")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert not (out / "final").exists()
    result = run("--resume", "--out", str(out))
    assert result.returncode == 0, result.stderr
    ours, theirs = weights(out / "final"), weights(undisturbed / "final")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_a_checkpoint_is_trained_further_on_a_file_with_its_own_tokenizer(undisturbed: Path, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(1, 60)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    out = tmp_path / "tuned"
    words = ("--model", str(undisturbed / "final"), "--steps", "4", "--eval-steps", "2", "--batch-size", "4")
    result = run(str(data), "--out", str(out), *words)
    assert result.returncode == 0, result.stderr
    record = json.loads((out / "final" / "training.json").read_text())
    assert record["model_type"] == str(undisturbed / "final")
    assert Checkpoint(out / "final").vocab_size == 32


@pytest.mark.parametrize("largest_file", [20_000, 150_000])
def test_a_disk_that_is_full_leaves_nothing_half_written(largest_file: int, undisturbed: Path, tmp_path: Path) -> None:
    """Writes beyond the limit fail, as they do on a full disk: in the weights, or in the optimiser's state."""
    out = tmp_path / "abacus"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    result = subprocess.run(
        command("abacus", "--out", str(out), *SMALL),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=limit,
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"out: {out} cannot be written" in line
    assert "Traceback" not in result.stderr
    left = {path.name for path in out.iterdir()}
    assert left == {"plan.json"}
    # With room again it ends as if there had always been.
    assert run("--resume", "--out", str(out)).returncode == 0
    for name, weight in weights(out / "final").items():
        assert torch.equal(weight, weights(undisturbed / "final")[name]), name


def test_two_processes_train_one_model_as_accelerate_launches_them(tmp_path: Path) -> None:
    out = tmp_path / "abacus"
    # What it runs for several GPUs; it would start one process alone without one.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [*launch, "-m", "tritonlm.cli", "train", "abacus", "--out", str(out), *SMALL]
    result = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is ready") == 1
    assert json.loads((out / "final" / "training.json").read_text())["steps"] == 12
    Checkpoint(out / "final").check()
    assert {path.name for path in out.iterdir()} >= {"final", "plan.json", "checkpoint-12"}


def test_a_checkpoint_that_was_cut_short_is_passed_over(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "abacus"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "final")
    for half in ("checkpoint-99", ".final"):
        (out / half).mkdir()
        (out / half / "model.safetensors").write_bytes(b"half")
    assert run("--resume", "--out", str(out)).returncode == 0
    assert not (out / "checkpoint-99").exists()
    assert not (out / ".final").exists()
    assert weights(out / "final").keys() == weights(undisturbed / "final").keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "data: name what to train on"),
        (("abacus", "--steps", "0"), "steps: Input should be greater"),
        (("nowhere/at/all.txt",), "data: nowhere/at/all.txt is neither a file here nor"),
        (("abacus", "--layers", "96", "--width", "8192"), "sizes: a model of 77,"),
        (("fable", "--batch-size", "65536"), "batch_size: a step of 65,536 sequences needs"),
        (("abacus", "--tokenizer", "keep"), "tokenizer: abacus brings its own"),
        (("abacus", "--width", "33", "--heads", "2"), "must be a multiple of heads"),
        (("abacus", "--model", "/nowhere"), "model: /nowhere cannot be loaded"),
        (("abacus", "--model", "x", "--width", "64"), "the sizes are the model's"),
        (("--resume",), "--resume needs the folder"),
        (("--resume", "--out", "/nowhere"), "there is no training to go on with"),
        (("--resume", "--out", "/nowhere", "--steps", "5"), "goes on as it began"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    out = () if "--out" in words or "--resume" in words else ("--out", str(tmp_path / "out"))
    result = CliRunner().invoke(app, ["train", *words, *out], env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    assert result.exit_code in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in result.output
