"""tritonlm compared with another server: same checkpoint, workloads and client, in alternation, in two rounds.

    scripts/bench serving --against vllm|llama.cpp|transformers|naive [--dtype int8] [--only W1-8 W2 …] [--write]

W1: 32 prompt tokens, 128 output tokens, concurrency 1, 8 and 32. W2: 512 prompt, 64 output tokens, concurrency 8. W3: a
shared prefix of 512 tokens plus 16 own prompt tokens, 32 output tokens, concurrency 8. The model is GPT-2 124M
with random weights and a tokenizer trained here. Both servers run on this machine. Each workload runs on one server and
then on the other, because the speed of a shared machine drifts from minute to minute; the processor use of the idle
server is reported. Run nothing else meanwhile. A rival is installed, or built, when it is first named. `--write` puts
the table into docs/performance.md and redraws the plot.
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
from load import Measurement, Workload, measure, prompts_of
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
# Fewer requests for a server that processes one at a time.
REQUEST_LIMITS = {"naive": 8}
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
        # Without an end-of-text token, all outputs have the requested length.
        config = GPT2Config(bos_token_id=None, eos_token_id=None)
        GPT2LMHeadModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


# The role of a tritonlm process by a part of its command line; the first match counts.
ROLES = {
    "-generate_": "generate (engine)", "-detokenize_": "detokenize", "-tokenize_": "tokenize",
    "bin/tritonserver": "Triton (IPC, gRPC)", "--default-model": "gateway",
}  # fmt: skip


def role_of(process: psutil.Process) -> str:
    """The role of a process; empty for an unknown one."""
    command = " ".join(process.cmdline())
    return next((role for pattern, role in ROLES.items() if pattern in command), "")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def launch(server: str, folder: Path, dtype: str, port: int) -> rivals.Launch:
    if server != OURS:
        return rivals.launch(server, folder, dtype, port)
    ports = [f"--{protocol}-port={free_port()}" for protocol in ("http", "grpc", "metrics")]
    weights = {"TRITONLM_WEIGHTS": "int8"} if dtype == INT8 else {}
    command = [
        *(sys.executable, "-m", "tritonlm.cli", "serve", "--checkpoint", f"model={folder}"),
        *("--dtype", dtype_of(dtype), "--port", str(port), *ports, "--no-training"),
    ]
    return rivals.Launch(command, "model", weights)


def dtype_of(dtype: str) -> str:
    """The number type of the checkpoint, also for int8 weights."""
    return "bfloat16" if dtype == INT8 else dtype


@dataclass(frozen=True)
class Running:
    """A running server."""

    url: str
    model: str
    pid: int
    started_at: float

    def resident_megabytes(self) -> float:
        """The memory of all its processes; shared pages count once."""
        return sum(process.memory_full_info().pss for process in self._processes()) / 1e6

    def processor_seconds(self) -> float:
        """The processor time of all its live processes."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(used.user + used.system for used in times)

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.pid)
        return [server, *server.children(recursive=True)]


@dataclass
class Round:
    """The results of one server in one round of all workloads."""

    start_seconds: float = 0.0
    resident_megabytes: float = 0.0
    # The share of all cores' time that the server used while the other one was measured.
    idle_cpu_share: float = 0.0
    measurements: dict[str, Measurement] = field(default_factory=dict)


@contextlib.contextmanager
def running(server: str, folder: Path, dtype: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Start a server, wait until it is ready, and stop it at the end."""
    with started(server, folder, dtype, options) as process:
        while not _is_ready(f"{process.url}/health"):
            if _has_ended(process.pid) or time.monotonic() > process.started_at + START_SECONDS:
                raise RuntimeError(f"{server} does not start; see {FOLDER / server}.log")
            time.sleep(0.1)
        yield process


@contextlib.contextmanager
def started(server: str, folder: Path, dtype: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Start a server without waiting, and stop it at the end."""
    port, log = free_port(), FOLDER / f"{server}.log"
    spec = launch(server, folder, dtype, port)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **spec.environment}
    # On SIGTERM, exit through the context managers, which stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started_at = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*spec.command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield Running(f"http://127.0.0.1:{port}", spec.model, process.pid, started_at)
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


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=2).is_success
    except httpx.TransportError:
        return False


def run_round(
    servers: Sequence[str], folder: Path, dtype: str, workloads: Sequence[Workload], seed: int
) -> list[Round]:
    """Run every workload on one server and then on the other; the order alternates with the seed."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rounds = [Round() for _ in servers]
    with contextlib.ExitStack() as stack:
        processes = []
        for server, result in zip(servers, rounds, strict=True):
            process = stack.enter_context(running(server, folder, dtype))
            _measure(process, Workload("first token", 1, 1, 8, 1), tokenizer, seed)
            result.start_seconds = time.monotonic() - process.started_at
            _measure(process, Workload("warm-up", 1, 1, 8, 8), tokenizer, seed)
            processes.append(process)
        order = [(0, 1), (1, 0)][seed % 2]
        idle_seconds = [0.0, 0.0]
        for work in workloads:
            for number in order:
                other = 1 - number
                before, start = processes[other].processor_seconds(), time.monotonic()
                measurement = _measure(processes[number], work, tokenizer, seed, REQUEST_LIMITS.get(servers[number]))
                rounds[number].measurements[work.name] = measurement
                rounds[other].idle_cpu_share += processes[other].processor_seconds() - before
                idle_seconds[other] += (time.monotonic() - start) * (os.cpu_count() or 1)
                stderr.print(f"{servers[number]}, round {seed + 1}: {work.name} {measurement.speed:,.0f} tokens/s")
        for result, process, seconds in zip(rounds, processes, idle_seconds, strict=True):
            result.resident_megabytes = process.resident_megabytes()
            result.idle_cpu_share /= seconds
    return rounds


def _measure(
    server: Running, work: Workload, tokenizer: Tokenizer, seed: int, requests: int | None = None
) -> Measurement:
    return measure(server.url, server.model, work, prompts_of(work, tokenizer, seed)[:requests])


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", choices=rivals.NAMES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", INT8], default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", "--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put table and plot into docs/performance.md")
    options = parser.parse_args()
    folder, workloads = make_checkpoint(dtype_of(options.dtype)), [WORKLOADS[name] for name in options.only]
    servers = (OURS, options.against)
    # Install and build the rival before the measurement.
    launch(options.against, folder, options.dtype, 0)
    rounds = [run_round(servers, folder, options.dtype, workloads, number) for number in range(options.rounds)]
    figures = {server: summary(results) for server, results in zip(servers, zip(*rounds, strict=True), strict=True)}
    text = serving_report.table(OURS, options.against, options.dtype, figures)
    print(text)
    if options.write:
        serving_report.write(OURS, options.against, options.dtype, figures, text)


def summary(rounds: Sequence[Round]) -> serving_report.Figures:
    """The means over the rounds."""
    return {
        "start, s": statistics.mean(result.start_seconds for result in rounds),
        "resident, MB": statistics.mean(result.resident_megabytes for result in rounds),
        "waiting, %": 100 * statistics.mean(result.idle_cpu_share for result in rounds),
        **{
            name: {
                "tokens/s": statistics.mean(result.measurements[name].speed for result in rounds),
                "first text, ms": statistics.mean(result.measurements[name].first_milliseconds for result in rounds),
            }
            for name in rounds[0].measurements
        },
    }


if __name__ == "__main__":
    main()
