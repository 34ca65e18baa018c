"""The GPU check is rehearsed on the CPU, with the real engine and under numpy 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# scripts/setup --dev installs it; the machine of docs/gpu has numpy 2, and the lock has 1.26.
NUMPY_2 = ROOT / ".cache" / "numpy-2"
# Packages that a GPU machine lacks: the engine imports them for the first grammar, and for a GGUF file.
ABSENT = ("llguidance", "gguf", "rich")


def _check(out: Path, *options: str, paths: Sequence[Path] = ()) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Exit code, results, and standard error of a rehearsal."""
    command = [str(ROOT / "scripts" / "gpu_check"), "--out", str(out), "--device", "cpu", "--tiny", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHON": sys.executable}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    lines = ended.stdout.splitlines()
    assert lines == (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return ended.returncode, [json.loads(line) for line in lines], ended.stderr.splitlines()


def test_the_rehearsal_runs_every_stage_under_numpy_2(tmp_path: Path) -> None:
    if not NUMPY_2.is_dir():
        pytest.skip("numpy 2 is not in .cache/numpy-2: scripts/setup --dev installs it")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ABSENT:
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')", encoding="utf-8")
    out = tmp_path / "out"
    stages = ("basics", "figures", "tests", "continuous_batching", "profile", "fleet", "start")
    code, results, errors = _check(out, "--devices", "3", "--stages", *stages, paths=(hidden, NUMPY_2))
    assert code == 0, [results[-1], errors, (out / "log.txt").read_text(encoding="utf-8")[-3000:]]
    assert results[0]["packages"]["numpy"].startswith("2.")
    assert results[-1]["summary"] == dict.fromkeys(stages, "ok")
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_stage.setdefault(result["stage"], []).append(result)
    assert [(line["family"], line["equal"]) for line in by_stage["basics"] if "family" in line] == [
        ("gpt2", 7), ("llama", 7),
    ]  # fmt: skip
    measured = [line for line in by_stage["figures"] if "decode_tokens_s" in line]
    assert [line["batch"] for line in measured] == [1, 3]
    assert all(0 < line["of_bandwidth"] < 1 for line in measured)
    compared = {line["batch"] for line in by_stage["continuous_batching"]}
    assert compared == {line["batch"] for line in measured}
    assert sum(line.get("passed", 0) for line in by_stage["tests"]) >= 3
    (fleet,) = by_stage["fleet"]
    assert (len(fleet["requests"]), sum(fleet["requests"]), fleet["equal"]) == (3, 12, 12)
    assert fleet["simulated"]
    # Nothing but results remains.
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "log.txt", "profile.txt"}


def test_a_stage_that_cannot_run_here_is_skipped_and_says_why(tmp_path: Path) -> None:
    described = tmp_path / "described" / "triton-0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0\n", encoding="utf-8")
    code, results, errors = _check(tmp_path / "out", "--stages", "quantized", paths=(described.parent,))
    assert code == 0, errors
    assert results[-1]["summary"] == {"quantized": "skipped: the reason is above"}
    assert [line["skipped"] for line in results if "skipped" in line] == [
        "triton-lang computes on a GPU alone; TRITON_INTERPRET=1 interprets it"
    ]


def test_a_total_limit_skips_stages_and_says_so(tmp_path: Path) -> None:
    code, results, _ = _check(tmp_path, "--seconds", "1", "--stages", "basics", "figures")
    assert code == 0
    assert all(text.startswith("skipped: ") and "total limit" in text for text in results[-1]["summary"].values())
