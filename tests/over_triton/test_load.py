"""A smoke test of the load test: all kinds of users, several processes, the report, and the exit code."""

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


def test_a_quick_run_succeeds_and_writes_a_report(bundled: Serve, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = traffic(
        bundled, "--quick", "--seconds", "10", "--prompts", "shared-prefix", "--processes", "2", "--report", str(report)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = report.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    # The report loads no external resources.
    assert not re.search(r"<(script|link|img|iframe)\b|@import", text)
    for entry in ("first text HTTP", "between tokens HTTP", "tokens/s HTTP", "first text gRPC", "gRPC fable",
                  "POST left early", "POST nonsense"):  # fmt: skip
        (row,) = [line for line in text.split("<tr>") if f"<td>{entry}</td>" in line]
        number, failed = row.split("</td><td>")[1:3]
        assert int(number) > 0, entry
        assert failed == "0", entry


def test_a_missed_goal_sets_the_exit_code(bundled: Serve) -> None:
    result = traffic(bundled, "--quick", "--seconds", "5", "--prompts", "chat", "--first", "0.001")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "MISSED" in result.stdout


def test_a_search_ends_with_a_rate(bundled: Serve) -> None:
    options = ["--shape", "saturation", "--seconds", "14", "--most-users", "32", "--first", "9000", "--between", "9000"]
    result = traffic(bundled, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "highest rate within the goal" in result.stdout
