"""Plots the dashboard's panels from a Prometheus, without Grafana, for the documentation:

python docker/grafana/picture.py http://127.0.0.1:9090 docs/images/dashboard.png --seconds 120
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot

FILE = Path(__file__).parent / "dashboards" / "tritonlm.json"
_COLUMNS, _STEP = 4, 2


def series(prometheus: str, query: str, seconds: int) -> list[dict[str, Any]]:
    end = time.time()
    parameters = urllib.parse.urlencode(
        {"query": query.replace("$__rate_interval", "15s"), "start": end - seconds, "end": end, "step": _STEP}
    )
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{parameters}", timeout=30) as response:
        result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result


def legend(pattern: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), pattern)


def plot(prometheus: str, seconds: int) -> Any:
    panels = [panel for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(18, 2.6 * rows), layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        for target in panel["targets"]:
            for result in series(prometheus, target["expr"], seconds):
                start = result["values"][0][0]
                points = [(moment - start, float(value)) for moment, value in result["values"] if value != "NaN"]
                label = legend(target["legendFormat"], result["metric"])
                axes.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1.2)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.set_title(panel["title"] + ("" if unit == "short" else f", {unit}"), fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        if axes.lines:
            axes.legend(fontsize=6, loc="upper left")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=int, default=120)
    arguments = parser.parse_args()
    plot(arguments.prometheus, arguments.seconds).savefig(arguments.out, dpi=70)


if __name__ == "__main__":
    main()
