"""Trained and large language models behind `tritonlm serve`: are all answered, exactly, whatever is asked at once?

    scripts/soak_real                        # gemma3-270m, and Llama and Qwen 3 of 1B and 3B with random weights
    scripts/soak_real smollm2-135m llama-1b  # these alone
    scripts/soak_real --long --write         # 64 long prompts at once as well; the table goes into docs/real_models.md

Each model is served by itself and asked: greedy texts alone and among 16, which must be equal; long prompts at once,
all of which must be answered; log-probabilities of a prompt (echo); four streams whose generate process is killed,
which must end with their undisturbed texts. Models of 3B are served once more in int8, with a prompt of 6,000 tokens.
It needs 24 GB of memory and 25 GB of disk for .cache/real_models. Exit code 1 where a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from real_checkpoints import CACHE, MODELS, SMOLLM2, Unavailable, checkpoint
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "real_models.md"
BEGIN, END = "<!-- soak_real: begin -->", "<!-- soak_real: end -->"
COLUMNS = ("model", "check", "result", "seconds", "memory, GB", "processor")
START_SECONDS, STOP_SECONDS, READY_SECONDS = 900.0, 60.0, 300.0
GREEDY_TOKENS, STREAM_TOKENS, ANSWER_TOKENS = 24, 48, 8
ECHO_TOKENS, INT8_PROMPT_TOKENS = 1000, 6000
# Our kernels give the same float again; Hugging Face's code rounds a prompt otherwise when it comes in other chunks.
ECHO_TOLERANCE = 1e-3
MOST_OF_AN_ERROR = 200
# When the process is killed: the four streams have had so many pieces together.
PIECES_BEFORE_KILL = 20
CONTEXT = 8192
PROSE = (
    "The lighthouse stood at the end of the pier, and at dusk its keeper climbed the 142 steps to light the lamp. "
    "He had done so for thirty-one years; only once, in the winter of 1962, had the storm kept him below. "
)
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA = {"max_position_embeddings": CONTEXT, "rope_parameters": ROPE, "tie_word_embeddings": True}
# Made on the spot with random weights; the tokenizer is SmolLM2's.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": ("llama", {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}),
    "qwen3-1b": ("qwen3", {**LLAMA, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 20,
                           "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}),
    "llama-3b": ("llama", {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                           "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}),
    "qwen3-3b": ("qwen3", {**LLAMA, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 28,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}),
}  # fmt: skip
DEFAULT = ("gemma3-270m", *SHAPES)
stderr = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    model: str
    check: str
    result: str
    seconds: float
    resident_gb: float

    @property
    def good(self) -> bool:
        return not self.result.startswith("FAILED")

    def cells(self, processor: str) -> tuple[str, ...]:
        seconds, resident = f"{self.seconds:.1f}", f"{self.resident_gb:.2f}"
        return self.model, self.check, self.result, seconds, resident, processor


class Failed(Exception):
    """A check did not find what it must."""


def folder_of(name: str) -> Path:
    if name in MODELS:
        return checkpoint(MODELS[name])
    folder = CACHE / name
    if not (folder / "config.json").exists():
        make(name, folder)
    return folder


def make(name: str, folder: Path) -> None:
    """Random weights in bfloat16."""
    # Slow to import, and most runs find the checkpoint in the cache.
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    stderr.print(f"{name}: making the checkpoint")
    family, shape = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(SMOLLM2))
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        del model
        gc.collect()
        Path(work).rename(folder)
        # The context removes it.
        Path(work).mkdir()


@dataclass
class Served:
    """A running server of one model, and what is asked of it."""

    model: str
    process: subprocess.Popen[bytes]
    http: httpx.Client
    tokenizer: Tokenizer
    seconds: float
    log: Path

    def body(self, prompt: str | Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        asked = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return asked | more

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json=self.body(prompt, max_tokens, **more))
        if not response.is_success:
            raise Failed(f"{response.status_code} {response.text[:150]}")
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, prompt: str | Sequence[int], max_tokens: int, **more: Any) -> str:
        return str(self.complete(prompt, max_tokens, **more)["choices"][0]["text"])

    def stream(self, prompt: str, max_tokens: int, on_piece: Callable[[], None], **more: Any) -> str:
        text = ""
        body = self.body(prompt, max_tokens, stream=True, **more)
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise Failed(str(event["error"])[:150])
                    text += "".join(choice["text"] for choice in event["choices"])
                    on_piece()
        return text

    def prompt_of(self, tokens: int, number: int) -> list[int]:
        """Prose of so many tokens; no two numbers have a beginning in common."""
        ids: list[int] = []
        chapter = 0
        while len(ids) < tokens:
            chapter += 1
            ids += self.tokenizer.encode(f"{number}: chapter {chapter}. {PROSE}").ids
        return ids[:tokens]

    def engine(self) -> psutil.Process:
        """The process of the model's generate."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if len(command) > 2 and command[-2] == f"{self.model}-generate_0_0":
                    return process
        raise Failed("there is no generate process")

    def resident_gb(self) -> float:
        with contextlib.suppress(psutil.Error, Failed):
            return float(self.engine().memory_info().rss / 1e9)
        return math.nan

    def wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise Failed(f"the server ended: {' | '.join(self.log.read_text().splitlines()[-3:])}")
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health/ready", timeout=10).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise Failed(f"the server is not ready after {seconds:.0f} s")
            time.sleep(0.2)


@contextlib.contextmanager
def serving(name: str, folder: Path, seconds: float, dtype: str = "auto", weights: str = "full") -> Iterator[Served]:
    """`tritonlm serve` on loopback, ended by its process id."""
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = free_ports(4)
        options = zip(("--port", "--http-port", "--grpc-port", "--metrics-port"), map(str, ports), strict=True)
        command = [sys.executable, "-m", "tritonlm.cli", "serve", "--checkpoint", f"{name}={folder}", "--device", "cpu"]
        command += ["--dtype", dtype, "--weights", weights, *(part for option in options for part in option)]
        # The soak asks for more than callers may wait for.
        environment = os.environ | {
            "TRITONLM_KEYS": str(work / "keys.json"),
            "TRITONLM_MAX_SECONDS": str(int(seconds)),
            "TRITONLM_QUEUE_SECONDS": str(int(seconds)),
        }
        log = work / "log.txt"
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        stack.callback(end, process)
        limits = httpx.Limits(max_connections=None)
        base = f"http://127.0.0.1:{ports[0]}"
        http = stack.enter_context(httpx.Client(base_url=base, timeout=seconds, trust_env=False, limits=limits))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        yield Served(name, process, http, tokenizer, seconds, log)


def end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
    process.wait(STOP_SECONDS)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returned; the first error is raised when all have ended."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result() for future in futures]


def greedy(served: Served) -> str:
    prompts = [f"{number}. {PROSE[number * 7 :]}" for number in range(16)]
    alone = [served.text(prompt, GREEDY_TOKENS) for prompt in prompts]
    among = at_once([lambda prompt=prompt: served.text(prompt, GREEDY_TOKENS) for prompt in prompts])  # type: ignore[misc]
    different = sum(one != other for one, other in zip(alone, among, strict=True))
    if different:
        raise Failed(f"{different} of 16 texts differ")
    return "16 of 16 equal"


def long_prompts(served: Served, requests: int, tokens: int, begin: int) -> str:
    answered = [False] * requests
    errors: list[str] = []

    def ask(number: int) -> None:
        try:
            usage = served.complete(served.prompt_of(tokens, begin + number), ANSWER_TOKENS)["usage"]
            answered[number] = usage["completion_tokens"] == ANSWER_TOKENS
        except (Failed, httpx.HTTPError) as error:
            errors.append(str(error) or type(error).__name__)

    at_once([lambda number=number: ask(number) for number in range(requests)])  # type: ignore[misc]
    if not all(answered):
        raise Failed(f"{sum(answered)} of {requests} answered; {errors[0] if errors else 'too few tokens'}")
    return f"{requests} of {requests} answered"


def echo(served: Served) -> str:
    prompt = served.prompt_of(ECHO_TOKENS, 999)
    rows = [served.complete(prompt, 1, echo=True, logprobs=1)["choices"][0]["logprobs"] for _ in range(2)]
    values = rows[0]["token_logprobs"]
    if len(values) != ECHO_TOKENS + 1 or values[0] is not None:
        raise Failed(f"{len(values)} log-probabilities for {ECHO_TOKENS + 1} tokens")
    if not all(isinstance(value, float) and math.isfinite(value) and value <= 0 for value in values[1:]):
        raise Failed("a log-probability is no finite number below 0")
    again = rows[1]["token_logprobs"]
    apart = max(abs(one - other) for one, other in zip(values[1:-1], again[1:-1], strict=True))
    found = (
        f"mean {sum(values[1:]) / ECHO_TOKENS:.3f}; asked for again {f'up to {apart:.2g} apart' if apart else 'equal'}"
    )
    if apart > ECHO_TOLERANCE:
        raise Failed(found)
    return found


def killed(served: Served) -> str:
    def texts(on_piece: Callable[[], None]) -> list[str]:
        return at_once(
            [
                lambda number=number: served.stream(  # type: ignore[misc]
                    f"{number}. {PROSE}", STREAM_TOKENS, on_piece, temperature=0.7, seed=number
                )
                for number in range(4)
            ]
        )

    undisturbed = texts(lambda: None)
    lock, seen = threading.Lock(), 0

    def kill_in_the_midst() -> None:
        nonlocal seen
        with lock:
            seen += 1
            if seen == PIECES_BEFORE_KILL:
                served.engine().kill()

    disturbed = texts(kill_in_the_midst)
    if seen < PIECES_BEFORE_KILL:
        raise Failed(f"the streams had {seen} pieces only: nothing was killed")
    same = sum(one == other for one, other in zip(undisturbed, disturbed, strict=True))
    if same < len(undisturbed):
        raise Failed(f"{same} of {len(undisturbed)} texts equal")
    served.wait_until_ready(READY_SECONDS)
    return f"{same} of {len(undisturbed)} equal"


@dataclass
class Soak:
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def run(self, name: str) -> None:
        try:
            folder = folder_of(name)
        except Unavailable as error:
            stderr.print(f"{name}: {error}", style="yellow")
            self.rows.append(Row(name, "fetch", f"skipped: {error}"[:MOST_OF_AN_ERROR], 0, math.nan))
            return
        tokens, requests = self.options.prompt_tokens, self.options.requests
        with serving(name, folder, self.options.check_seconds, self.options.dtype) as served:
            if not self._check(served, "start", lambda: self._started(served)):
                return
            self._check(served, "greedy, alone and among 16", lambda: greedy(served))
            counts = (requests, 64) if self.options.long else (requests,)
            for count in counts:
                what = f"{count} prompts of {tokens:,} tokens at once"
                self._check(served, what, lambda count=count: long_prompts(served, count, tokens, 100 * count))  # type: ignore[misc]
            self._check(served, f"echo, log-probabilities of {ECHO_TOKENS:,} tokens", lambda: echo(served))
            self._check(served, "generate killed amid 4 streams", lambda: killed(served))
        if name.endswith("-3b") or self.options.int8:
            with serving(name, folder, self.options.check_seconds, self.options.dtype, "int8") as served:
                if self._check(served, "start, int8", lambda: self._started(served)):
                    what = f"int8, one prompt of {INT8_PROMPT_TOKENS:,} tokens"
                    self._check(served, what, lambda: long_prompts(served, 1, INT8_PROMPT_TOKENS, 7))

    def _started(self, served: Served) -> str:
        served.wait_until_ready(START_SECONDS)
        served.text("Hello", 1)
        return "ready"

    def _check(self, served: Served, what: str, check: Callable[[], str]) -> bool:
        stderr.print(f"{served.model}: {what} …")
        began = time.monotonic()
        try:
            result = check()
        except (Failed, httpx.HTTPError) as error:
            # The report names no path of this machine.
            result = f"FAILED: {str(error) or type(error).__name__}".replace(f"{ROOT}/", "")[:MOST_OF_AN_ERROR]
            stderr.print(served.log.read_text()[-1500:], style="dim", markup=False)
        model = served.model if self.options.dtype == "auto" else f"{served.model}, {self.options.dtype}"
        row = Row(model, what, result, time.monotonic() - began, served.resident_gb())
        self.rows.append(row)
        stderr.print(
            f"{served.model}: {what}: {result} ({row.seconds:.1f} s, {row.resident_gb:.2f} GB)",
            style="green" if row.good else "red", markup=False,
        )  # fmt: skip
        return row.good


def processor() -> str:
    """The kind, its cores, and what of it matters to the kernels."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    named = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(re.findall(r"^flags\s*:\s*(.+)", text, re.MULTILINE)[0].split()) if "flags" in text else set()
    known = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    name = named[1].strip() if named else "unknown"
    return f"{name}, {os.cpu_count()} cores, {known[0] if known else 'no AVX2'}"


def write_report(rows: Sequence[Row], kind: str) -> None:
    """Replace the rows of these models in the report's table, and keep the others'."""
    head, begin, rest = REPORT.read_text(encoding="utf-8").partition(BEGIN)
    old, end_mark, tail = rest.partition(END)
    if not begin or not end_mark:
        raise SystemExit(f"{REPORT.name} has lost its marks {BEGIN} and {END}")
    measured = {row.model for row in rows}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---|---|"]
    lines += [line for line in old.strip().splitlines()[2:] if line.split("|")[1].strip() not in measured]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row.cells(kind)) + " |" for row in rows]
    REPORT.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + tail, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = sorted({*MODELS, *SHAPES})
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(choices)}")
    parser.add_argument("--requests", type=int, default=8, help="long prompts at once")
    parser.add_argument("--prompt-tokens", type=int, default=1800, help="tokens of a long prompt")
    parser.add_argument("--long", action="store_true", help="64 long prompts at once as well")
    parser.add_argument("--int8", action="store_true", help="serve the smaller models in int8 as well")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="the checkpoint's if auto"
    )
    parser.add_argument("--check-seconds", type=float, default=3600, help="how long one answer may take")
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{REPORT.name}")
    options = parser.parse_args()
    names = options.models or DEFAULT
    if unknown := [name for name in names if name not in choices]:
        parser.error(f"unknown model {unknown[0]!r}; choose of {', '.join(choices)}")
    soak, kind = Soak(options), processor()
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            soak.run(name)
    finally:
        table = Table(*COLUMNS)
        for row in soak.rows:
            table.add_row(*row.cells(kind), style="" if row.good else "red")
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        if options.write and soak.rows:
            write_report(soak.rows, kind)
    return 0 if all(row.good for row in soak.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
