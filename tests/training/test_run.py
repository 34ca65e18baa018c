"""Small real trainings: their files, resuming a killed training to identical weights, and error messages."""

from __future__ import annotations

import json
import shutil
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

from .processes import run, start

SMALL = (
    "--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "8", "--steps", "12", "--eval-steps", "4",
    "--warmup-steps", "2", "--threads", "1",
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "abacus"
    result = run("abacus", "--out", str(out), *SMALL)
    assert result.returncode == 0, result.stderr
    assert "step 12 of 12" in result.stderr
    return out


def test_a_training_writes_a_checkpoint_a_record_and_a_report(undisturbed: Path) -> None:
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


def test_every_checkpoint_is_complete(undisturbed: Path) -> None:
    checkpoints = [path for path in undisturbed.iterdir() if path.name.startswith("checkpoint-")]
    assert checkpoints
    for checkpoint in checkpoints:
        Checkpoint(checkpoint).check()
        assert json.loads((checkpoint / "training.json").read_text())["step"] == int(checkpoint.name.split("-")[1])


def test_a_killed_training_resumes_to_identical_weights(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "abacus"
    process, _ = start("abacus", "--out", str(out), *SMALL)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoint-*/training.json")):
            assert process.is_alive(), "the training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join(60)
    assert not (out / "final").exists()
    result = run("--resume", "--out", str(out))
    assert result.returncode == 0, result.stderr
    resumed, expected = weights(out / "final"), weights(undisturbed / "final")
    assert resumed.keys() == expected.keys()
    for name, weight in resumed.items():
        assert torch.equal(weight, expected[name]), name


def test_fine_tuning_on_a_file_keeps_the_checkpoints_tokenizer(undisturbed: Path, tmp_path: Path) -> None:
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
def test_a_full_disk_leaves_no_partial_files(largest_file: int, undisturbed: Path, tmp_path: Path) -> None:
    """Writes beyond the file size limit fail as on a full disk: in the weights, or in the optimizer's state."""
    out = tmp_path / "abacus"
    result = run("abacus", "--out", str(out), *SMALL, largest_file=largest_file)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"out: {out} cannot be written" in line
    assert "Traceback" not in result.stderr
    remaining = {path.name for path in out.iterdir()}
    assert remaining == {"plan.json"}
    # Resumed without the limit, the training produces the same weights.
    assert run("--resume", "--out", str(out)).returncode == 0
    for name, weight in weights(out / "final").items():
        assert torch.equal(weight, weights(undisturbed / "final")[name]), name


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    out = tmp_path / "abacus"
    # What accelerate runs for several GPUs; without GPUs, accelerate itself would start one process only.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [*launch, "-m", "tritonlm.cli", "train", "abacus", "--out", str(out), *SMALL]
    result = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is ready") == 1
    assert json.loads((out / "final" / "training.json").read_text())["steps"] == 12
    Checkpoint(out / "final").check()
    assert {path.name for path in out.iterdir()} >= {"final", "plan.json", "checkpoint-12"}


def test_an_incomplete_checkpoint_is_removed(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "abacus"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "final")
    for incomplete in ("checkpoint-99", ".final"):
        (out / incomplete).mkdir()
        (out / incomplete / "model.safetensors").write_bytes(b"incomplete")
    assert run("--resume", "--out", str(out)).returncode == 0
    assert not (out / "checkpoint-99").exists()
    assert not (out / ".final").exists()
    assert weights(out / "final").keys() == weights(undisturbed / "final").keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "data: name what to train on"),
        (("abacus", "--steps", "0"), "steps: Input should be greater"),
        (("nowhere/at/all.txt",), "data: nowhere/at/all.txt is neither a file here nor"),
        (("abacus", "--layers", "96", "--width", "8192"), "sizes: a model of 77,"),
        (("fable", "--batch-size", "65536"), "batch_size: a step of 65,536 sequences needs"),
        (("abacus", "--tokenizer", "keep"), "tokenizer: abacus has its own"),
        (("abacus", "--width", "33", "--heads", "2"), "must be a multiple of heads"),
        (("abacus", "--model", "/nowhere"), "model: /nowhere cannot be loaded"),
        (("abacus", "--model", "x", "--width", "64"), "--model sets the sizes"),
        (("--resume",), "--resume needs the folder"),
        (("--resume", "--out", "/nowhere"), "there is no training to resume"),
        (("--resume", "--out", "/nowhere", "--steps", "5"), "a resumed training keeps its options"),
    ],
)
def test_an_invalid_option_is_one_error_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    out = () if "--out" in words or "--resume" in words else ("--out", str(tmp_path / "out"))
    result = CliRunner().invoke(app, ["train", *words, *out], env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    assert result.exit_code in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in result.output
