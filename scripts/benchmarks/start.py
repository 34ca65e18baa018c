"""The start-up time of a server, and the memory of all its processes when the KV cache is full.

    scripts/bench start [--dtype bfloat16] [--slots 32] [--rounds 3]
    scripts/bench start --checkpoint FILE.gguf --against llama.cpp

Times from the start of the command to the first response on its port (503, not ready), to readiness, and to the first
token. Memory by process (shared pages count once): after the first token, and when every slot has filled its context of
1,024 tokens. GPT-2 124M with random weights. With --against: the time to the first token of both servers, started in
alternation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import psutil
import rivals
import servers
from load import Workload, prompts_of
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 992, 32
FIRST = Workload("first token", 1, 1, 8, 1)


def memory(server: int) -> dict[str, float]:
    """Megabytes by role."""
    megabytes = dict.fromkeys((*servers.ROLES.values(), "supervisor", "others"), 0.0)
    main = psutil.Process(server)
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            role = "supervisor" if process == main else servers.role_of(process) or "others"
            megabytes[role] += process.memory_full_info().pss / 1e6
    return megabytes


def start_times(url: str, started_at: float) -> Iterator[float]:
    """Seconds until the first response, and until the server is ready."""
    for accepted in ((200, 503), (200,)):
        while servers.status(f"{url}/health/ready") not in accepted:
            if time.monotonic() > started_at + servers.START_SECONDS:
                raise RuntimeError("the server does not start")
            time.sleep(0.01)
        yield time.monotonic() - started_at


def run_round(folder: Path, dtype: str, slots: int) -> tuple[list[float], dict[str, float], dict[str, float]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with servers.started(servers.OURS, folder, dtype, ("--max-sequences", str(slots))) as server:
        seconds = list(start_times(server.url, server.started_at))
        server.measure(FIRST, prompts_of(FIRST, tokenizer, 0))
        seconds.append(time.monotonic() - server.started_at)
        before = memory(server.pid)
        full = Workload("full", slots, slots, PROMPT_TOKENS, NEW_TOKENS)
        server.measure(full, prompts_of(full, tokenizer, 0))
        return seconds, before, memory(server.pid)


def first_token_seconds(name: str, folder: Path, dtype: str) -> float:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with servers.running(name, folder, dtype) as server:
        server.measure(FIRST, prompts_of(FIRST, tokenizer, 0))
        return time.monotonic() - server.started_at


def compare(rival: str, model: checkpoints.Model, dtype: str, rounds: int) -> None:
    folder = model.checkpoint(dtype)
    # Installs, builds and converts before anything is measured; the first start of each fills the page cache.
    servers.launch(rival, folder, dtype, 0)
    times = [[first_token_seconds(name, folder, dtype) for name in (servers.OURS, rival)] for _ in range(rounds + 1)]
    ours, theirs = (statistics.median(each[1:]) for each in zip(*times, strict=True))
    print(f"{model.title}: first token {ours:.2f} s, {rival} {theirs:.2f} s; {os.cpu_count()} cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--slots", "--places", type=int, default=32)
    parser.add_argument("--rounds", "--turns", type=int, default=3)
    parser.add_argument("--against", choices=rivals.NAMES)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--model", choices=tuple(checkpoints.MODELS), default="gpt2", help="with --against")
    chosen.add_argument("--checkpoint", type=Path, help="with --against: a folder or a GGUF file")
    options = parser.parse_args()
    if options.against:
        model = checkpoints.of_path(options.checkpoint) if options.checkpoint else checkpoints.MODELS[options.model]
        compare(options.against, model, options.dtype, options.rounds)
    elif options.checkpoint or options.model != "gpt2":
        parser.error("--model and --checkpoint need --against")
    else:
        measure_alone(checkpoints.gpt2(options.dtype), options)


def measure_alone(folder: Path, options: argparse.Namespace) -> None:
    rounds = [run_round(folder, options.dtype, options.slots) for _ in range(options.rounds)]
    response, ready, first = (statistics.median(times) for times in zip(*(row[0] for row in rounds), strict=True))
    console = Console()
    console.print(f"first response (not ready) {response:.2f} s, ready {ready:.2f} s, first token {first:.2f} s")
    table = Table(title=f"memory, MB, {options.dtype}, {options.slots} slots of 1,024 tokens, {os.cpu_count()} cores")
    for name in ("", "after the first token", "with a full cache"):
        table.add_column(name, justify="right" if name else "left")
    _, before, after = rounds[-1]
    for role in before:
        table.add_row(role, f"{before[role]:,.0f}", f"{after[role]:,.0f}")
    table.add_row("all", f"{sum(before.values()):,.0f}", f"{sum(after.values()):,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
