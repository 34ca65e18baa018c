"""The report of a run: options, measurements and three charts, in one self-contained HTML file.

It draws samples and does not know how they were measured.
"""

from __future__ import annotations

import argparse
import html
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from locust.env import Environment
from locust.stats import StatsEntry
from measures import Window
from shapes import Shape

mpl.use("svg")
from matplotlib import pyplot

_PERCENTILES = (0.5, 0.9, 0.95, 0.99)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1d21; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #d5d7de; text-align: right; }
td:first-child, th:first-child { text-align: left; } .no { color: #b3141c; } svg { width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Sample:
    seconds: float
    users: int
    window: Window


@dataclass(frozen=True)
class Report:
    environment: Environment
    options: argparse.Namespace
    samples: Sequence[Sample]
    total: Window
    shape: Shape
    met: bool

    def summary(self) -> str:
        total, verdict = self.total, "met" if self.met else "MISSED"
        lines = [
            f"{total.requests_per_second:.1f} requests/s, {total.tokens_per_second:.0f} tokens/s, "
            f"{total.failures:.2%} failed",
            f"first text: {total.first_median:.0f} ms (median), {total.first:.0f} ms (95 %); between tokens: "
            f"{total.between_median:.1f} and {total.between:.1f} ms",
        ]
        for users, window, met in getattr(self.shape, "steps", []):
            lines.append(
                f"  {users} users: {window.requests_per_second:.1f} requests/s, first text {window.first:.0f} ms, "
                f"between tokens {window.between:.1f} ms: {'met' if met else 'missed'}"
            )
        if best := getattr(self.shape, "best", None):
            users, window = best
            lines.append(
                f"highest rate within the goal: {window.requests_per_second:.1f} requests/s "
                f"({window.tokens_per_second:.0f} tokens/s), with {users} users"
            )
        goal = self.shape.goal
        lines.append(
            f"goal (95 %): first text within {goal.first:g} ms, between tokens within {goal.between:g} ms, at most "
            f"{goal.failures:.1%} failed: {verdict}"
        )
        return "\n".join(lines)

    def html(self) -> str:
        options = {
            "shape": os.environ.get("TRAFFIC_SHAPE", "constant"),
            "prompts": self.options.prompts,
            "maximum users": self.options.most_users,
            "requests per second of each user": self.options.throughput,
            "gRPC users": "yes" if self.options.grpc else "no",
            "seconds": f"{self.samples[-1].seconds:.0f}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        charts = [
            ("Percentiles over time", self._over_time()),
            ("Latency against load", self._against_load()),
            ("Users and rates", self._rates()),
        ]
        parts = [
            "<h1>tritonlm under load</h1>",
            f"<pre class={'yes' if self.met else 'no'}>{html.escape(self.summary())}</pre>",
            "<h2>Options</h2>",
            _table(["", ""], [[name, str(value)] for name, value in options.items()]),
            "<h2>Measurements</h2>",
            "<p>In milliseconds, except <em>tokens/s</em>, the speed of one stream, whose percentiles count from the "
            "fastest.</p>",
            _table(["", "number", "failed", *(f"{share:.0%}" for share in _PERCENTILES)], self._rows()),
            *(f"<h2>{title}</h2>{chart}" for title, chart in charts),
        ]
        body = "\n".join(parts)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>tritonlm under load</title>'
            f"<style>{_STYLE}</style>{body}</html>\n"
        )

    def _rows(self) -> list[list[str]]:
        entries = sorted(self.environment.stats.entries.values(), key=lambda entry: (entry.method, entry.name))
        return [
            [
                f"{entry.method} {entry.name}",
                str(entry.num_requests),
                str(entry.num_failures),
                *(f"{_value(entry, share):,.1f}" for share in _PERCENTILES),
            ]
            for entry in entries
        ]

    def _over_time(self) -> str:
        figure, (first, between) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True)
        times = [sample.seconds for sample in self.samples]
        for axes, name in ((first, "first"), (between, "between")):
            for kind, label in (("_median", "median"), ("", "95 %")):
                axes.plot(times, [getattr(sample.window, name + kind) for sample in self.samples], label=label)
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left")
            axes.grid(alpha=0.3)
        first.set_ylabel("first text, ms")
        between.set_ylabel("between tokens, ms")
        between.set_xlabel("seconds")
        return _to_svg(figure)

    def _against_load(self) -> str:
        figure, axes = pyplot.subplots(figsize=(10, 4))
        load = [sample.window.requests_per_second for sample in self.samples]
        axes.scatter(load, [sample.window.first for sample in self.samples], s=14, label="first text, 95 %")
        axes.scatter(load, [sample.window.between for sample in self.samples], s=14, label="between tokens, 95 %")
        axes.axhline(self.shape.goal.first, linestyle="--", linewidth=1, color="grey", label="goal for the first text")
        axes.set_xlabel("requests/s, in two seconds")
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
        axes.grid(alpha=0.3)
        return _to_svg(figure)

    def _rates(self) -> str:
        figure, axes = pyplot.subplots(figsize=(10, 4))
        times = [sample.seconds for sample in self.samples]
        axes.plot(times, [sample.users for sample in self.samples], label="users")
        axes.plot(times, [sample.window.requests_per_second for sample in self.samples], label="requests/s")
        axes.set_xlabel("seconds")
        axes.set_ylim(bottom=0)
        other = axes.twinx()
        tokens = [sample.window.tokens_per_second for sample in self.samples]
        other.plot(times, tokens, color="tab:green", label="tokens/s")
        other.set_ylim(bottom=0)
        axes.legend(loc="upper left")
        other.legend(loc="upper right")
        axes.grid(alpha=0.3)
        return _to_svg(figure)


def _value(entry: StatsEntry, share: float) -> float:
    # A high percentile of a speed is a slow stream, as for times.
    if entry.method == "tokens/s":
        return float(entry.get_response_time_percentile(1 - share))
    return float(entry.get_response_time_percentile(share))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _to_svg(figure: Any) -> str:
    output = io.StringIO()
    figure.tight_layout()
    figure.savefig(output, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = output.getvalue()
    return text[text.index("<svg") :]
