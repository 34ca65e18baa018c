"""Writes the results of `serving`: a JSON file that accumulates runs, and from it the page's tables and the plot.

There is one table for each model and kind of processor. A run replaces the rows of its rival in its table; all other
figures stay, under the kind and the commit that they were seen on. This module knows numbers and docs/performance.md,
not how the numbers were measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import processor
from checkpoints import LONG_WORKLOADS, MODELS, WORKLOADS, Model

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS, PLOT = ROOT / "docs" / "performance" / "serving.json", ROOT / "docs" / "performance" / "serving.svg"
# The figures of one server: start time and memory; by workload speed, time to the first text, and the machine's limits.
Figures = dict[str, float | dict[str, float]]
_SPEED, _FIRST, _SHARE = "tokens/s", "first text, ms", "of limit, %"
_READ, _MATMUL = "read, GB/s", "matmul, GFLOP/s"
_NOT_SEEN = "not seen"


@dataclass(frozen=True)
class Result:
    """One run against one rival."""

    kind: str
    model: str
    title: str
    rival: str
    dtype: str
    cores: int
    date: str
    # Without one for the oldest figures.
    commit: str
    ours: Figures
    theirs: Figures

    @classmethod
    def of(cls, kind: str, model: Model, rival: str, dtype: str, figures: Mapping[str, Figures]) -> Result:
        ours, theirs = figures.values()
        cores, date = os.cpu_count() or 1, time.strftime("%Y-%m-%d")
        return cls(kind, model.name, model.title, rival, dtype, cores, date, processor.commit(), ours, theirs)

    @property
    def key(self) -> str:
        return f"{self.model}, {self.kind}, {self.rival_title}"

    @property
    def rival_title(self) -> str:
        return self.rival if self.dtype == "bfloat16" else f"{self.rival} {self.dtype}"

    @property
    def workloads(self) -> list[str]:
        return [name for name in WORKLOADS | LONG_WORKLOADS if name in self.ours and name in self.theirs]

    def ratio(self, workload: str) -> float:
        return _row(self.ours, workload)[_SPEED] / _row(self.theirs, workload)[_SPEED]


def table(results: Sequence[Result]) -> str:
    """The table of one model on one kind of processor."""
    lines = [
        "| rival | workload | tritonlm, tokens/s | rival's | ratio | first text, ms | rival's | of limit | rival's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_line(result, name) for result in results for name in result.workloads),
        "",
        *(_footer(result) for result in results),
    ]
    return "\n".join(lines)


def _line(result: Result, name: str) -> str:
    rows, ratio = [_row(figures, name) for figures in (result.ours, result.theirs)], result.ratio(name)
    cells = [_speed(row[_SPEED]) for row in rows] + [f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"]
    cells += [f"{row[_FIRST]:,.0f}" if _FIRST in row else "" for row in rows]
    cells += [f"{row[_SHARE]:.0f} %" if _SHARE in row else "" for row in rows]
    return f"| {result.rival_title} | {name} | {' | '.join(cells)} |"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _footer(result: Result) -> str:
    """A list item: what the figures of this rival come from."""
    weights = "bfloat16 with int8 weights (q8_0 there)" if result.dtype == "int8" else result.dtype
    commit = f", commit {result.commit}" if result.commit else ""
    parts = [f"- {result.rival_title}: {weights}, {result.cores} cores, {result.date}{commit}."]
    for label, key, unit in (
        ("From start to the first token", "start, s", "s"),
        ("Resident memory at the end, all processes", "resident, MB", "MB"),
        ("Idle, while the other server was measured", "waiting, %", "% of all cores' time"),
    ):
        if key in result.ours and key in result.theirs:
            digits = 0 if unit == "MB" else 1
            parts.append(
                f"{label}: {result.ours[key]:,.{digits}f}, {result.rival} {result.theirs[key]:,.{digits}f} {unit}."
            )
    for label, key, unit in (("Read bandwidth", _READ, "GB/s"), ("Matmul peak", _MATMUL, "GFLOP/s")):
        values = [_row(result.ours, name).get(key) for name in result.workloads]
        if known := [value for value in values if value is not None]:
            parts.append(f"{label} in the run: {min(known):,.0f} to {max(known):,.0f} {unit}.")
    return " ".join(parts)


def overview(results: Sequence[Result]) -> str:
    """For each model and kind the lowest ratio to each rival, or that no machine of ours had it."""
    kinds = [*processor.KINDS, *sorted({result.kind for result in results} - set(processor.KINDS))]
    titles = {model.name: model.title for model in MODELS.values()} | {one.model: one.title for one in results}
    lines = ["| model | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name, title in titles.items():
        cells = [_lowest([one for one in results if (one.model, one.kind) == (name, kind)]) for kind in kinds]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lowest(results: Sequence[Result]) -> str:
    lowest = [(one.rival_title, *min((one.ratio(name), name) for name in one.workloads)) for one in results]
    return ", ".join(f"{rival} {ratio:.2f} ({name})" for rival, ratio, name in lowest) or _NOT_SEEN


def page_part(results: Sequence[Result]) -> str:
    """The overview, and the tables by model and kind."""
    parts = [overview(results)]
    for _, group in groupby(results, key=lambda result: (result.model, result.kind)):
        of_table = list(group)
        parts += [f"#### {of_table[0].title}: {of_table[0].kind}", table(of_table)]
    return "\n\n".join(parts)


def load() -> list[Result]:
    """All results, in the order of the page."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    models, kinds = list(MODELS), list(processor.KINDS)

    def order(result: Result) -> tuple[int, str, int, str, str]:
        model = models.index(result.model) if result.model in models else len(models)
        kind = kinds.index(result.kind) if result.kind in kinds else len(kinds)
        return model, result.model, kind, result.kind, result.rival_title

    return sorted((Result(**row) for row in stored.values()), key=order)


def write(result: Result) -> None:
    """Replace this rival's figures in its table, and redraw the plot."""
    results = {one.key: one for one in load()} | {result.key: result}
    RESULTS.parent.mkdir(exist_ok=True)
    rows = {key: asdict(one) for key, one in results.items()}
    RESULTS.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    replace_part("serving", page_part(load()))
    if of_gpt2 := [one for one in load() if one.model == "gpt2"]:
        plot_ratios(of_gpt2)


def replace_part(name: str, text: str) -> None:
    """Replace the text between the two marks of this name on the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in page:
        raise SystemExit(f"{PAGE} has no mark {begin}")
    head, _, rest = page.partition(begin)
    PAGE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def plot_ratios(results: Sequence[Result]) -> None:
    """Plot the speed ratio to each rival by workload; each pair is from one run."""
    workloads = [name for name in WORKLOADS if any(name in result.workloads for result in results)]
    width = 0.8 / len(results)
    with plot_file(PLOT) as (axes,):
        for number, result in enumerate(results):
            shift = (number - (len(results) - 1) / 2) * width
            positions = [workloads.index(name) + shift for name in result.workloads]
            ratios = [result.ratio(name) for name in result.workloads]
            bars = axes.bar(positions, ratios, width, label=f"{result.rival_title}, {result.kind}")
            axes.bar_label(bars, fmt="%.1f", fontsize=6)
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


def _row(figures: Figures, workload: str) -> dict[str, float]:
    row = figures[workload]
    assert isinstance(row, dict)
    return row
