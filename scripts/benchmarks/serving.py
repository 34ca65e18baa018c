"""The whole path against a rival on the same checkpoint, workloads and client: in alternation, all of it twice.

    scripts/bench serving --against vllm|llama.cpp|transformers|naive [--dtype int8] [--only W1-8 W2 …] [--write]

W1: 32 tokens in, 128 out, at 1, 8 and 32 at once; W2: 512 in, 64 out, 8 at once; W3: a shared prefix of 512 tokens and
16 of its own in, 32 out, 8 at once. GPT-2 124M with random weights and a tokenizer trained here. Both servers run, on
this machine's loopback, and each workload is asked of the one and right after of the other, since a shared machine's
speed drifts from minute to minute; what the one that waits takes of the processors is told. Leave the machine alone
meanwhile. A rival is installed, or built, when it is first named. `--write` puts the table into docs/performance.md,
and draws the picture there anew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import rivals
import serving_report
import torch
from load import Measured, Workload, measure, prompts_of
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "benchmarks"
WORKLOADS = {
    "W1-1": Workload("W1-1", 1, 8, 32, 128), "W1-8": Workload("W1-8", 8, 48, 32, 128),
    "W1-32": Workload("W1-32", 32, 128, 32, 128), "W2": Workload("W2", 8, 32, 512, 64),
    "W3": Workload("W3", 8, 32, 16, 32, shared_tokens=512),
}  # fmt: skip
# A rival that answers one at a time would take an hour for what the others do in a minute.
FEWER = {"naive": 8}
START_SECONDS, STOP_SECONDS = 300.0, 60.0
OURS, INT8 = "tritonlm", "int8"
stderr = Console(stderr=True)


def make_checkpoint(dtype: str) -> Path:
    """GPT-2 124M with random weights, and a byte-level tokenizer trained on Python's own library."""
    folder = FOLDER / f"gpt2-124m-{dtype}-endless"
    if not (folder / "config.json").exists():
        library = sorted(Path(os.__file__).parent.glob("*.py"))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=50_256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train([str(file) for file in library], trainer)
        tokenizer.add_tokens([f"<|{n}|>" for n in range(50_256 - tokenizer.get_vocab_size())])
        tokenizer.add_special_tokens(["<|endoftext|>"])
        end = "<|endoftext|>"
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
        torch.manual_seed(0)
        # Without a token that ends a text: all answers have the length that is asked for.
        config = GPT2Config(bos_token_id=None, eos_token_id=None)
        GPT2LMHeadModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


# What a process of ours is, by a piece of its command line; the first that fits.
ROLES = {
    "-generate_": "generate (engine)", "-detokenize_": "detokenize", "-tokenize_": "tokenize",
    "bin/tritonserver": "Triton (IPC, gRPC)", "--default-model": "gateway",
}  # fmt: skip


def role_of(process: psutil.Process) -> str:
    """Empty for what has no name here."""
    command = " ".join(process.cmdline())
    return next((role for piece, role in ROLES.items() if piece in command), "")


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def launch(server: str, folder: Path, dtype: str, port: int) -> rivals.Launch:
    if server != OURS:
        return rivals.launch(server, folder, dtype, port)
    ports = [f"--{door}-port={free_port()}" for door in ("http", "grpc", "metrics")]
    weights = {"TRITONLM_WEIGHTS": "int8"} if dtype == INT8 else {}
    command = [
        *(sys.executable, "-m", "tritonlm.cli", "serve", "--checkpoint", f"model={folder}"),
        *("--dtype", dtype_of(dtype), "--port", str(port), *ports, "--no-training"),
    ]
    return rivals.Launch(command, "model", weights)


def dtype_of(dtype: str) -> str:
    """Of the checkpoint, and of what is computed with int8 weights."""
    return "bfloat16" if dtype == INT8 else dtype


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    model: str
    pid: int
    begun: float

    def resident_megabytes(self) -> float:
        """Of all its processes; what several share counts once."""
        return sum(process.memory_full_info().pss for process in self._processes()) / 1e6

    def processor_seconds(self) -> float:
        """Of all its processes that are still there."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(spent.user + spent.system for spent in times)

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.pid)
        return [server, *server.children(recursive=True)]


@dataclass
class Turn:
    """One server's, with all workloads."""

    start_seconds: float = 0.0
    resident_megabytes: float = 0.0
    # Of the time that all cores had while the other one was asked.
    share_while_waiting: float = 0.0
    works: dict[str, Measured] = field(default_factory=dict)


@contextlib.contextmanager
def running(server: str, folder: Path, dtype: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Started until it answers, and stopped in the end."""
    with started(server, folder, dtype, options) as opened:
        while not _answers(f"{opened.url}/health"):
            if _has_ended(opened.pid) or time.monotonic() > opened.begun + START_SECONDS:
                raise RuntimeError(f"{server} does not start; see {FOLDER / server}.log")
            time.sleep(0.1)
        yield opened


@contextlib.contextmanager
def started(server: str, folder: Path, dtype: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Just started, and stopped in the end."""
    port, log = free_port(), FOLDER / f"{server}.log"
    how = launch(server, folder, dtype, port)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **how.environment}
    # Who is told to end takes along what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*how.command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield Running(f"http://127.0.0.1:{port}", how.model, process.pid, begun)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)


def _has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=2).is_success
    except httpx.TransportError:
        return False


def take_turns(servers: Sequence[str], folder: Path, dtype: str, works: Sequence[Workload], seed: int) -> list[Turn]:
    """One turn of each: every workload is asked of one server after the other. Who is first changes with the seed."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    turns = [Turn() for _ in servers]
    with contextlib.ExitStack() as stack:
        both = []
        for server, turn in zip(servers, turns, strict=True):
            opened = stack.enter_context(running(server, folder, dtype))
            _ask(opened, Workload("first token", 1, 1, 8, 1), tokenizer, seed)
            turn.start_seconds = time.monotonic() - opened.begun
            _ask(opened, Workload("warm-up", 1, 1, 8, 8), tokenizer, seed)
            both.append(opened)
        order = [(0, 1), (1, 0)][seed % 2]
        waited = [0.0, 0.0]
        for work in works:
            for number in order:
                other = 1 - number
                before, began = both[other].processor_seconds(), time.monotonic()
                found = _ask(both[number], work, tokenizer, seed, FEWER.get(servers[number]))
                turns[number].works[work.name] = found
                turns[other].share_while_waiting += both[other].processor_seconds() - before
                waited[other] += (time.monotonic() - began) * (os.cpu_count() or 1)
                stderr.print(f"{servers[number]}, turn {seed + 1}: {work.name} {found.speed:,.0f} tokens/s")
        for turn, opened, seconds in zip(turns, both, waited, strict=True):
            turn.resident_megabytes = opened.resident_megabytes()
            turn.share_while_waiting /= seconds
    return turns


def _ask(opened: Running, work: Workload, tokenizer: Tokenizer, seed: int, requests: int | None = None) -> Measured:
    return measure(opened.url, opened.model, work, prompts_of(work, tokenizer, seed)[:requests])


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", choices=rivals.NAMES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", INT8], default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put table and plot into docs/performance.md")
    options = parser.parse_args()
    folder, works = make_checkpoint(dtype_of(options.dtype)), [WORKLOADS[name] for name in options.only]
    servers = (OURS, options.against)
    # What a rival needs is installed and built before anything is measured.
    launch(options.against, folder, options.dtype, 0)
    turns = [take_turns(servers, folder, options.dtype, works, number) for number in range(options.turns)]
    figures = {server: summary(taken) for server, taken in zip(servers, zip(*turns, strict=True), strict=True)}
    text = serving_report.table(OURS, options.against, options.dtype, figures)
    print(text)
    if options.write:
        serving_report.write(OURS, options.against, options.dtype, figures, text)


def summary(turns: Sequence[Turn]) -> serving_report.Figures:
    """The mean of the turns."""
    return {
        "start, s": statistics.mean(turn.start_seconds for turn in turns),
        "resident, MB": statistics.mean(turn.resident_megabytes for turn in turns),
        "waiting, %": 100 * statistics.mean(turn.share_while_waiting for turn in turns),
        **{
            name: {
                "tokens/s": statistics.mean(turn.works[name].speed for turn in turns),
                "first text, ms": statistics.mean(turn.works[name].first_milliseconds for turn in turns),
            }
            for name in turns[0].works
        },
    }


if __name__ == "__main__":
    main()
