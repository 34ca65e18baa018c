"""`tritonlm status --watch`: what runs and waits, how fast, how full, a line for each language model, until Ctrl-C."""

from __future__ import annotations

import time
from typing import Any

from rich.live import Live
from rich.table import Table

from tritonlm.client.sync import Client

from .common import console, print_json

_COLUMNS = ("model", "Tritons", "running", "waiting", "places", "tokens/s", "KV cache", "cached", "ended", "refused")
_BAR = 12


def watch(client: Client, every: float, as_json: bool) -> None:
    """A table that is drawn anew; where there is no terminal, one after another; for scripts, one object in a line."""
    if as_json or not console.is_terminal:
        while True:
            reports = client.models.reports()
            print_json(reports) if as_json else console.print(table(reports))
            time.sleep(every)
    with Live(table(client.models.reports()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(table(client.models.reports()), refresh=True)


def table(reports: dict[str, list[dict[str, Any]]]) -> Table:
    made = Table(caption=time.strftime("%H:%M:%S"))
    for name in _COLUMNS:
        made.add_column(name, justify="left" if name in ("model", "KV cache") else "right")
    for model, found in reports.items():
        made.add_row(*_row(model, found))
    if not reports:
        made.add_row("no Triton answers, or no language model is loaded")
    return made


def _row(model: str, reports: list[dict[str, Any]]) -> list[str]:
    def total(name: str) -> float:
        return float(sum(report[name] for report in reports))

    prompts = total("prompt_tokens") + total("cached_tokens")
    waiting = total("waiting")
    return [
        model,
        str(len(reports)),
        f"{total('running'):.0f}",
        f"[yellow]{waiting:.0f}[/yellow]" if waiting else "0",
        f"{total('places'):.0f}",
        f"{total('tokens_per_second'):,.0f}",
        _bar(total("blocks_used") / max(total("blocks"), 1.0)),
        f"{total('cached_tokens') / prompts:.0%}" if prompts else "–",
        f"{total('finished'):,.0f}",
        f"{total('refused'):,.0f}",
    ]


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return f"{'█' * full}{'·' * (_BAR - full)} {share:.0%}"
