"""`tritonlm status --watch`: a live table with load, throughput and cache use of each language model."""

from __future__ import annotations

import time
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from tritonlm.client.models import slots_of
from tritonlm.client.sync import Client

from .common import console, print_json

_COLUMNS = ("model", "Tritons", "running", "waiting", "slots", "tokens/s", "KV cache", "cached", "finished", "refused")
_BAR = 12


def watch(client: Client, interval: float, as_json: bool) -> None:
    """A table that is updated in place; without a terminal, one table after another; with --json, JSON objects."""
    if as_json or not console.is_terminal:
        while True:
            reports = client.models.reports()
            print_json(reports) if as_json else console.print(table(reports))
            time.sleep(interval)
    with Live(table(client.models.reports()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(table(client.models.reports()), refresh=True)


def table(reports: dict[str, list[dict[str, Any]]]) -> Table:
    result = Table(caption=time.strftime("%H:%M:%S"))
    for name in _COLUMNS:
        result.add_column(name, justify="left" if name in ("model", "KV cache") else "right")
    for model, model_reports in reports.items():
        result.add_row(*_row(model, model_reports))
    if not reports:
        result.add_row("no Triton responds, or no language model is loaded")
    return result


def _row(model: str, reports: list[dict[str, Any]]) -> list[str | Text]:
    def total(name: str) -> float:
        return float(sum(report[name] for report in reports))

    prompts = total("prompt_tokens") + total("cached_tokens")
    waiting = total("waiting")
    return [
        model,
        str(len(reports)),
        f"{total('running'):.0f}",
        Text(f"{waiting:.0f}", style="yellow" if waiting else ""),
        str(sum(map(slots_of, reports))),
        f"{total('tokens_per_second'):,.0f}",
        _bar(total("blocks_used") / max(total("blocks"), 1.0)),
        f"{total('cached_tokens') / prompts:.0%}" if prompts else "–",
        f"{total('finished'):,.0f}",
        f"{total('refused'):,.0f}",
    ]


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return f"{'█' * full}{'·' * (_BAR - full)} {share:.0%}"
