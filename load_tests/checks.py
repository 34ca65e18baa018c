"""The checks at the end of a load test: measured values, their bounds, and the overall result. It knows no servers."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

console = Console()


@dataclass(frozen=True)
class Check:
    """`bound` is the limit, or the value before the load; `number_format` formats both numbers."""

    name: str
    measured: float
    bound: float
    passed: bool
    number_format: str = "{:,.0f}"


def report_checks(title: str, checks: list[Check], errors: list[str]) -> bool:
    """Print the checks and the first errors; returns whether all checks passed."""
    table = Table(title=title)
    for name in ("", "measured", "bound", " "):
        table.add_column(name, justify="right" if name.strip() else "left")
    for check in checks:
        numbers = (check.number_format.format(check.measured), check.number_format.format(check.bound))
        table.add_row(check.name, *numbers, "passed" if check.passed else "[red]FAILED[/red]")
    console.print(table)
    for text in errors[:5]:
        console.print(f"  {text}", style="red", markup=False)
    return all(check.passed for check in checks)
