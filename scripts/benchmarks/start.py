"""How soon a server answers after its start, and the memory of all its processes when its KV cache is full.

    scripts/bench start [--dtype bfloat16] [--places 32] [--turns 3]

From the start of the command to the first answer on its port (not ready yet: 503), to readiness, and to a first token.
Memory is told by process (what several share counts once): after the first token, and when as many requests as there
are places have filled their contexts of 1,024 tokens. GPT-2 124M with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import serving
from load import Workload, measure, prompts_of
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 992, 32


def memory(server: int) -> dict[str, float]:
    """Megabytes by role."""
    found = dict.fromkeys((*serving.ROLES.values(), "supervisor", "others"), 0.0)
    main = psutil.Process(server)
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            role = "supervisor" if process == main else serving.role_of(process) or "others"
            found[role] += process.memory_full_info().pss / 1e6
    return found


def status(url: str) -> int:
    try:
        return httpx.get(f"{url}/health/ready", trust_env=False, timeout=2).status_code
    except httpx.TransportError:
        return 0


def moments(url: str, begun: float) -> Iterator[float]:
    """Seconds until it answers at all, and until it is ready."""
    for wanted in ((200, 503), (200,)):
        while status(url) not in wanted:
            if time.monotonic() > begun + serving.START_SECONDS:
                raise RuntimeError("the server does not start")
            time.sleep(0.01)
        yield time.monotonic() - begun


def take_turn(folder: Path, dtype: str, places: int) -> tuple[list[float], dict[str, float], dict[str, float]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with serving.started(serving.OURS, folder, dtype, ("--max-sequences", str(places))) as opened:
        found = list(moments(opened.url, opened.begun))
        first = Workload("first token", 1, 1, 8, 1)
        measure(opened.url, opened.model, first, prompts_of(first, tokenizer, 0))
        found.append(time.monotonic() - opened.begun)
        before = memory(opened.pid)
        full = Workload("full", places, places, PROMPT_TOKENS, NEW_TOKENS)
        measure(opened.url, opened.model, full, prompts_of(full, tokenizer, 0))
        return found, before, memory(opened.pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    folder = serving.make_checkpoint(options.dtype)
    turns = [take_turn(folder, options.dtype, options.places) for _ in range(options.turns)]
    answered, ready, first = (statistics.median(found) for found in zip(*(turn[0] for turn in turns), strict=True))
    console = Console()
    console.print(f"first answer (not ready) {answered:.2f} s, ready {ready:.2f} s, first token {first:.2f} s")
    table = Table(title=f"memory, MB, {options.dtype}, {options.places} places of 1,024 tokens, {os.cpu_count()} cores")
    for name in ("", "after the first token", "with a full cache"):
        table.add_column(name, justify="right" if name else "left")
    _, before, after = turns[-1]
    for role in before:
        table.add_row(role, f"{before[role]:,.0f}", f"{after[role]:,.0f}")
    table.add_row("all", f"{sum(before.values()):,.0f}", f"{sum(after.values()):,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
