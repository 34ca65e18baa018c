"""What a load test holds a service to, and what it saw: one table, one verdict. It knows nothing of servers."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

console = Console()


@dataclass(frozen=True)
class Promise:
    """`bound` is what was promised, or what was seen before; `shown` is how both are written."""

    name: str
    seen: float
    bound: float
    kept: bool
    shown: str = "{:,.0f}"


def verdict(title: str, promises: list[Promise], wrong: list[str]) -> bool:
    """Show them, and the first answers that were wrong; whether all were kept."""
    table = Table(title=title)
    for name in ("", "seen", "bound", " "):
        table.add_column(name, justify="right" if name.strip() else "left")
    for promise in promises:
        numbers = (promise.shown.format(promise.seen), promise.shown.format(promise.bound))
        table.add_row(promise.name, *numbers, "kept" if promise.kept else "[red]NOT KEPT[/red]")
    console.print(table)
    for text in wrong[:5]:
        console.print(f"  {text}", style="red", markup=False)
    return all(promise.kept for promise in promises)
