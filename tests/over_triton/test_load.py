"""The load test as a smoke test: all kinds of users, spread over processes, a report, and an exit code that judges."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from contract_tables import ROOT

from .test_serve import Serve

pytestmark = pytest.mark.triton


def traffic(bundled: Serve, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "load_tests" / "traffic.py"), "--url"]
    command += [f"http://127.0.0.1:{bundled.ports['port']}", "--grpc", bundled.grpc, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_a_quick_run_serves_everybody_and_reports(bundled: Serve, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = traffic(
        bundled, "--quick", "--seconds", "10", "--prompts", "shared-prefix", "--processes", "2", "--report", str(report)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    # Nothing that a browser would fetch.
    assert not re.search(r"<(script|link|img|iframe)\b|@import", text)
    for entry in ("first text HTTP", "between tokens HTTP", "tokens/s HTTP", "first text gRPC", "gRPC fable",
                  "POST left early", "POST nonsense"):  # fmt: skip
        (row,) = [line for line in text.split("<tr>") if f"<td>{entry}</td>" in line]
        number, failed = row.split("</td><td>")[1:3]
        assert int(number) > 0, entry
        assert failed == "0", entry


def test_a_goal_that_is_missed_is_the_exit_code(bundled: Serve) -> None:
    done = traffic(bundled, "--quick", "--seconds", "5", "--prompts", "chat", "--first", "0.001")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT KEPT" in done.stdout


def test_a_search_ends_with_a_rate(bundled: Serve) -> None:
    options = ["--shape", "saturation", "--seconds", "14", "--most-users", "32", "--first", "9000", "--between", "9000"]
    done = traffic(bundled, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "highest rate within the goal" in done.stdout
