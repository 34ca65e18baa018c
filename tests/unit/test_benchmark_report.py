"""The tables that the benchmarks write into docs/performance.md, each between its own marks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("serving_report", BENCHMARKS / "serving_report.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PAGE", "RESULTS", "PLOT"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    module.PAGE.write_text("# Page\n\n<!-- vllm -->\nold\n<!-- end of vllm -->\n\nafter\n", encoding="utf-8")
    return module


def figures(speed: float) -> dict[str, Any]:
    return {
        "start, s": 3.0,
        "resident, MB": 900.0,
        "waiting, %": 0.4,
        "W2": {"tokens/s": speed, "first text, ms": 12.0},
    }


def test_a_table_shows_both_servers_and_their_ratio(report: Any) -> None:
    text = report.table("ours", "vllm", "bfloat16", {"ours": figures(300.0), "vllm": figures(200.0)})
    assert "| W2 | 300 | 200 | 1.50 | 12 | 12 |" in text
    assert "0.4 % of all cores' time, vllm 0.4 %." in text
    assert "int8" not in text
    assert "int8 weights (q8_0 there)" in report.table("o", "v", "int8", {"o": figures(2.0), "v": figures(1.0)})


def test_write_replaces_the_old_table_and_keeps_the_rest(report: Any) -> None:
    both = {"ours": figures(300.0), "vllm": figures(200.0)}
    for _ in range(2):
        report.write("ours", "vllm", "bfloat16", both, "the new table")
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == "# Page\n\n<!-- vllm -->\n\nthe new table\n\n<!-- end of vllm -->\n\nafter\n"
    results = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert results["vllm"]["theirs"] == figures(200.0)
    assert report.PLOT.read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(SystemExit, match="has no mark <!-- another -->"):
        report.replace_part("another", "text")


def test_the_page_has_marks_for_each_table() -> None:
    page = (BENCHMARKS.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in ("vllm", "llama.cpp", "llama.cpp int8", "transformers", "naive", "growth"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1
