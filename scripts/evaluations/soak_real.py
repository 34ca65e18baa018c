"""A soak test of trained and large language models behind `tritonlm serve`: exact outputs under concurrent load.

    scripts/soak_real                        # gemma3-270m, and Llama and Qwen 3 of 1B and 3B with random weights
    scripts/soak_real smollm2-135m llama-1b  # these alone
    scripts/soak_real --long --write         # also 64 concurrent long prompts; the table goes into docs/real_models.md

Each model is served alone. Checks: greedy texts, sequential and 16 at a time, must be equal; concurrent long prompts
must all be answered; log-probabilities of a prompt (echo) must be valid and repeatable; four streams must end with the
same texts when the generate process is killed. Models of 3B are also served in int8, with a prompt of 6,000 tokens. The
script needs 24 GB of memory, and 25 GB of disk for .cache/real_models. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks.processor import kind
from random_checkpoints import SHAPES, random_checkpoint
from real_checkpoints import CACHE, MODELS, Unavailable, checkpoint
from rich.console import Console
from rich.table import Table
from soak_server import PROSE, CheckFailed, Server, serving

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "real_models.md"
BEGIN, END = "<!-- soak_real: begin -->", "<!-- soak_real: end -->"
COLUMNS = ("model", "check", "result", "seconds", "memory, GB", "processor")
START_SECONDS, READY_SECONDS = 900.0, 300.0
GREEDY_TOKENS, STREAM_TOKENS, ANSWER_TOKENS = 24, 48, 8
ECHO_TOKENS, INT8_PROMPT_TOKENS = 1000, 6000
# The native kernels are reproducible; Hugging Face's code rounds differently when a prompt is split into other chunks.
ECHO_TOLERANCE = 1e-3
MAX_ERROR_CHARACTERS = 200
# The total number of chunks of the four streams after which the process is killed.
CHUNKS_BEFORE_KILL = 20
DEFAULT = ("gemma3-270m", "llama-1b", "qwen3-1b", "llama-3b", "qwen3-3b")
stderr = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    model: str
    check: str
    result: str
    seconds: float
    resident_gb: float

    @property
    def passed(self) -> bool:
        return not self.result.startswith("FAILED")

    def cells(self, processor: str) -> tuple[str, ...]:
        seconds, resident = f"{self.seconds:.1f}", f"{self.resident_gb:.2f}"
        return self.model, self.check, self.result, seconds, resident, processor


def checkpoint_folder(name: str) -> Path:
    return checkpoint(MODELS[name]) if name in MODELS else random_checkpoint(name)


def run_concurrently(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all calls; the first error is raised after all have ended."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result() for future in futures]


def check_greedy(server: Server) -> str:
    prompts = [f"{number}. {PROSE[number * 7 :]}" for number in range(16)]
    alone = [server.text(prompt, GREEDY_TOKENS) for prompt in prompts]
    concurrent = run_concurrently([lambda prompt=prompt: server.text(prompt, GREEDY_TOKENS) for prompt in prompts])  # type: ignore[misc]
    different = sum(one != other for one, other in zip(alone, concurrent, strict=True))
    if different:
        raise CheckFailed(f"{different} of 16 texts differ")
    return "16 of 16 equal"


def check_long_prompts(server: Server, requests: int, tokens: int, begin: int) -> str:
    answered = [False] * requests
    errors: list[str] = []

    def send(number: int) -> None:
        try:
            usage = server.complete(server.make_prompt(tokens, begin + number), ANSWER_TOKENS)["usage"]
            answered[number] = usage["completion_tokens"] == ANSWER_TOKENS
        except (CheckFailed, httpx.HTTPError) as error:
            errors.append(str(error) or type(error).__name__)

    run_concurrently([lambda number=number: send(number) for number in range(requests)])  # type: ignore[misc]
    if not all(answered):
        raise CheckFailed(f"{sum(answered)} of {requests} answered; {errors[0] if errors else 'too few tokens'}")
    return f"{requests} of {requests} answered"


def check_echo(server: Server) -> str:
    prompt = server.make_prompt(ECHO_TOKENS, 999)
    rows = [server.complete(prompt, 1, echo=True, logprobs=1)["choices"][0]["logprobs"] for _ in range(2)]
    values = rows[0]["token_logprobs"]
    if len(values) != ECHO_TOKENS + 1 or values[0] is not None:
        raise CheckFailed(f"{len(values)} log-probabilities for {ECHO_TOKENS + 1} tokens")
    if not all(isinstance(value, float) and math.isfinite(value) and value <= 0 for value in values[1:]):
        raise CheckFailed("a log-probability is not a finite number below 0")
    repeated = rows[1]["token_logprobs"]
    difference = max(abs(one - other) for one, other in zip(values[1:-1], repeated[1:-1], strict=True))
    repetition = f"differs by up to {difference:.2g}" if difference else "equal"
    summary = f"mean {sum(values[1:]) / ECHO_TOKENS:.3f}; repeated: {repetition}"
    if difference > ECHO_TOLERANCE:
        raise CheckFailed(summary)
    return summary


def check_kill(server: Server) -> str:
    def texts(on_chunk: Callable[[], None]) -> list[str]:
        return run_concurrently(
            [
                lambda number=number: server.stream(  # type: ignore[misc]
                    f"{number}. {PROSE}", STREAM_TOKENS, on_chunk, temperature=0.7, seed=number
                )
                for number in range(4)
            ]
        )

    undisturbed = texts(lambda: None)
    lock, chunks = threading.Lock(), 0

    def count_and_kill() -> None:
        nonlocal chunks
        with lock:
            chunks += 1
            if chunks == CHUNKS_BEFORE_KILL:
                server.engine_process().kill()

    disturbed = texts(count_and_kill)
    if chunks < CHUNKS_BEFORE_KILL:
        raise CheckFailed(f"the streams had only {chunks} chunks: nothing was killed")
    same = sum(one == other for one, other in zip(undisturbed, disturbed, strict=True))
    if same < len(undisturbed):
        raise CheckFailed(f"{same} of {len(undisturbed)} texts equal")
    server.wait_until_ready(READY_SECONDS)
    return f"{same} of {len(undisturbed)} equal"


@dataclass
class Soak:
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def run(self, name: str) -> None:
        try:
            folder = checkpoint_folder(name)
        except Unavailable as error:
            stderr.print(f"{name}: {error}", style="yellow")
            self.rows.append(Row(name, "fetch", f"skipped: {error}"[:MAX_ERROR_CHARACTERS], 0, math.nan))
            return
        tokens, requests = self.options.prompt_tokens, self.options.requests
        with serving(name, folder, self.options.check_seconds, self.options.dtype) as server:
            if not self._check(server, "start", lambda: self._started(server)):
                return
            self._check(server, "greedy, sequential and 16 concurrent", lambda: check_greedy(server))
            counts = (requests, 64) if self.options.long else (requests,)
            for count in counts:
                check_name = f"{count} concurrent prompts of {tokens:,} tokens"
                self._check(
                    server, check_name, lambda count=count: check_long_prompts(server, count, tokens, 100 * count)
                )  # type: ignore[misc]
            self._check(server, f"echo, log-probabilities of {ECHO_TOKENS:,} tokens", lambda: check_echo(server))
            self._check(server, "generate killed during 4 streams", lambda: check_kill(server))
        if name.endswith("-3b") or self.options.int8:
            with serving(name, folder, self.options.check_seconds, self.options.dtype, "int8") as server:
                if self._check(server, "start, int8", lambda: self._started(server)):
                    check_name = f"int8, one prompt of {INT8_PROMPT_TOKENS:,} tokens"
                    self._check(server, check_name, lambda: check_long_prompts(server, 1, INT8_PROMPT_TOKENS, 7))

    def _started(self, server: Server) -> str:
        server.wait_until_ready(START_SECONDS)
        server.text("Hello", 1)
        return "ready"

    def _check(self, server: Server, name: str, check: Callable[[], str]) -> bool:
        stderr.print(f"{server.model}: {name} …")
        start = time.monotonic()
        try:
            result = check()
        except (CheckFailed, httpx.HTTPError) as error:
            # Remove local paths from the report.
            result = f"FAILED: {str(error) or type(error).__name__}".replace(f"{ROOT}/", "")[:MAX_ERROR_CHARACTERS]
            stderr.print(server.log.read_text()[-1500:], style="dim", markup=False)
        model = server.model if self.options.dtype == "auto" else f"{server.model}, {self.options.dtype}"
        row = Row(model, name, result, time.monotonic() - start, server.resident_gb())
        self.rows.append(row)
        stderr.print(
            f"{server.model}: {name}: {result} ({row.seconds:.1f} s, {row.resident_gb:.2f} GB)",
            style="green" if row.passed else "red", markup=False,
        )  # fmt: skip
        return row.passed


def write_report(rows: Sequence[Row], processor: str) -> None:
    """Replace the rows of these models in the report's table, and keep the other rows."""
    head, begin, rest = REPORT.read_text(encoding="utf-8").partition(BEGIN)
    old, end_mark, tail = rest.partition(END)
    if not begin or not end_mark:
        raise SystemExit(f"{REPORT.name} lacks the marks {BEGIN} and {END}")
    measured = {row.model for row in rows}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---|---|"]
    lines += [line for line in old.strip().splitlines()[2:] if line.split("|")[1].strip() not in measured]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row.cells(processor)) + " |" for row in rows]
    REPORT.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + tail, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = sorted({*MODELS, *SHAPES})
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(choices)}")
    parser.add_argument("--requests", type=int, default=8, help="concurrent long prompts")
    parser.add_argument("--prompt-tokens", type=int, default=1800, help="tokens of a long prompt")
    parser.add_argument("--long", action="store_true", help="also 64 concurrent long prompts")
    parser.add_argument("--int8", action="store_true", help="serve the smaller models in int8, too")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="the checkpoint's if auto"
    )
    parser.add_argument("--check-seconds", type=float, default=3600, help="timeout of one request")
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{REPORT.name}")
    options = parser.parse_args()
    names = options.models or DEFAULT
    if unknown := [name for name in names if name not in choices]:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(choices)}")
    soak, processor = Soak(options), f"{os.cpu_count()} cores, {kind().name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            soak.run(name)
    finally:
        table = Table(*COLUMNS)
        for row in soak.rows:
            table.add_row(*row.cells(processor), style="" if row.passed else "red")
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        if options.write and soak.rows:
            write_report(soak.rows, processor)
    return 0 if all(row.passed for row in soak.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
