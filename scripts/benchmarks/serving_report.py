"""Writes the results of `serving` as a table, a plot and a JSON file that accumulates runs.

It knows numbers and docs/performance.md, not how the numbers were measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS, PLOT = ROOT / "docs" / "performance" / "serving.json", ROOT / "docs" / "performance" / "serving.svg"
# The figures of one server: start time and memory, and speed and time to the first text by workload.
Figures = dict[str, float | dict[str, float]]
_SPEED, _FIRST = "tokens/s", "first text, ms"


def table(ours: str, rival: str, dtype: str, figures: Mapping[str, Figures]) -> str:
    own, theirs = figures[ours], figures[rival]
    rows = [
        f"| | {ours}, tokens/s | {rival}, tokens/s | ratio | first text, ms | {rival}'s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in own:
        left, right = own[name], theirs[name]
        if isinstance(left, dict) and isinstance(right, dict):
            rows.append(
                f"| {name} | {left[_SPEED]:,.0f} | {right[_SPEED]:,.0f} | {left[_SPEED] / right[_SPEED]:.2f} | "
                f"{left[_FIRST]:,.0f} | {right[_FIRST]:,.0f} |"
            )
    weights = "bfloat16 with int8 weights (q8_0 there)" if dtype == "int8" else dtype
    description = f"GPT-2 124M, random weights, {weights}, {machine()}."
    footer = (
        f"From start to the first token: {own['start, s']:.1f} s, {rival} {theirs['start, s']:.1f} s. Resident memory "
        f"at the end, all processes: {own['resident, MB']:,.0f} MB, {rival} {theirs['resident, MB']:,.0f} MB.\n"
        f"Idle, while the other server was measured: {own['waiting, %']:.1f} % of all cores' time, {rival} "
        f"{theirs['waiting, %']:.1f} %."
    )
    return "\n".join([description, "", *rows, "", footer])


def machine() -> str:
    """The machine and the date of the measurement."""
    return f"{os.cpu_count()} cores ({_processor()}), {time.strftime('%Y-%m-%d')}"


def _processor() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    isa = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{name}\b", flags)]
    return isa[0] if isa else "no known vector instructions"


def write(ours: str, rival: str, dtype: str, figures: Mapping[str, Figures], text: str) -> None:
    """Replace this rival's table, and redraw the plot of all rivals."""
    name = rival if dtype == "bfloat16" else f"{rival} {dtype}"
    replace_part(name, text)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[name] = {"ours": figures[ours], "theirs": figures[rival], "machine": machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    plot_ratios(results)


def replace_part(name: str, text: str) -> None:
    """Replace the text between the two marks of this name on the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in page:
        raise SystemExit(f"{PAGE} has no mark {begin}")
    head, _, rest = page.partition(begin)
    PAGE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def plot_ratios(results: Mapping[str, dict[str, Figures]]) -> None:
    """Plot the speed ratio to each rival by workload; each pair is from one run."""
    workloads = [name for name, row in next(iter(results.values()))["ours"].items() if isinstance(row, dict)]
    width = 0.8 / len(results)
    with plot_file(PLOT) as (axes,):
        for number, (rival, pair) in enumerate(sorted(results.items())):
            ratios = [
                _speed(pair["ours"], work) / _speed(pair["theirs"], work) for work in workloads if work in pair["ours"]
            ]
            positions = [n + (number - (len(results) - 1) / 2) * width for n in range(len(ratios))]
            axes.bar_label(axes.bar(positions, ratios, width, label=rival), fmt="%.1f", fontsize=7)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.set_xticks(range(len(workloads)), workloads)
        axes.set_ylabel("tritonlm's tokens/s over the rival's")
        axes.legend(frameon=False, ncols=3, fontsize=8)


@contextlib.contextmanager
def plot_file(file: Path, columns: int = 1) -> Iterator[Sequence[Any]]:
    """Yield axes side by side; write the file on exit."""
    import matplotlib  # noqa: PLC0415 (slow to import)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    # Makes the SVG file reproducible.
    matplotlib.rcParams["svg.hashsalt"] = "tritonlm"
    figure, axes = pyplot.subplots(1, columns, figsize=(9, 4.2), squeeze=False)
    yield axes[0]
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _speed(figures: Figures, workload: str) -> float:
    row = figures[workload]
    assert isinstance(row, dict)
    return row[_SPEED]
