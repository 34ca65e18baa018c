"""What `serving` has measured, as a table, as a picture and as a file of figures that later runs add to.

It knows numbers and docs/performance.md; where the numbers come from it does not know.
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
KEPT, PICTURE = ROOT / "docs" / "performance" / "serving.json", ROOT / "docs" / "performance" / "serving.svg"
# Of one server: its start and its memory, and for each workload its speed and its time to the first text.
Figures = dict[str, float | dict[str, float]]
_SPEED, _FIRST = "tokens/s", "first text, ms"


def table(ours: str, rival: str, dtype: str, figures: Mapping[str, Figures]) -> str:
    mine, theirs = figures[ours], figures[rival]
    rows = [
        f"| | {ours}, tokens/s | {rival}, tokens/s | ratio | first text, ms | {rival}'s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in mine:
        left, right = mine[name], theirs[name]
        if isinstance(left, dict) and isinstance(right, dict):
            rows.append(
                f"| {name} | {left[_SPEED]:,.0f} | {right[_SPEED]:,.0f} | {left[_SPEED] / right[_SPEED]:.2f} | "
                f"{left[_FIRST]:,.0f} | {right[_FIRST]:,.0f} |"
            )
    weights = "bfloat16 with int8 weights (q8_0 there)" if dtype == "int8" else dtype
    about = f"GPT-2 124M, random weights, {weights}, {machine()}."
    after = (
        f"From start to the first token: {mine['start, s']:.1f} s, {rival} {theirs['start, s']:.1f} s. Resident in the "
        f"end, all processes: {mine['resident, MB']:,.0f} MB, {rival} {theirs['resident, MB']:,.0f} MB.\n"
        f"While the other one was asked: {mine['waiting, %']:.1f} % of the processors' time, {rival} "
        f"{theirs['waiting, %']:.1f} %."
    )
    return "\n".join([about, "", *rows, "", after])


def machine() -> str:
    """What was measured on, and when."""
    return f"{os.cpu_count()} cores ({_processor()}), {time.strftime('%Y-%m-%d')}"


def _processor() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    kinds = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{name}\b", flags)]
    return kinds[0] if kinds else "no vector units that are known here"


def write(ours: str, rival: str, dtype: str, figures: Mapping[str, Figures], text: str) -> None:
    """In the place of this rival's last table, and into the picture of all."""
    name = rival if dtype == "bfloat16" else f"{rival} {dtype}"
    replace_part(name, text)
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    kept[name] = {"ours": figures[ours], "theirs": figures[rival], "machine": machine()}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    draw(kept)


def replace_part(name: str, text: str) -> None:
    """Of the page: what stands between the two marks of this name."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in page:
        raise SystemExit(f"{PAGE} has no mark {begin}")
    head, _, rest = page.partition(begin)
    PAGE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def draw(kept: Mapping[str, dict[str, Figures]]) -> None:
    """How many times as fast as each rival, workload by workload, each pair from one run."""
    works = [name for name, found in next(iter(kept.values()))["ours"].items() if isinstance(found, dict)]
    width = 0.8 / len(kept)
    with picture(PICTURE) as (axes,):
        for number, (rival, pair) in enumerate(sorted(kept.items())):
            ratios = [
                _speed(pair["ours"], work) / _speed(pair["theirs"], work) for work in works if work in pair["ours"]
            ]
            places = [n + (number - (len(kept) - 1) / 2) * width for n in range(len(ratios))]
            axes.bar_label(axes.bar(places, ratios, width, label=rival), fmt="%.1f", fontsize=7)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.set_xticks(range(len(works)), works)
        axes.set_ylabel("tritonlm's tokens/s over the rival's")
        axes.legend(frameon=False, ncols=3, fontsize=8)


@contextlib.contextmanager
def picture(file: Path, columns: int = 1) -> Iterator[Sequence[Any]]:
    """Axes to draw on, side by side; the file when all is drawn."""
    import matplotlib  # noqa: PLC0415 (slow to import)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    # The same drawing gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "tritonlm"
    figure, axes = pyplot.subplots(1, columns, figsize=(9, 4.2), squeeze=False)
    yield axes[0]
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _speed(figures: Figures, work: str) -> float:
    found = figures[work]
    assert isinstance(found, dict)
    return found[_SPEED]
