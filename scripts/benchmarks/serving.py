"""The whole path against a rival on the same checkpoint, workloads and client: both in turn, twice, in alternation.

    scripts/bench serving --against naive|transformers [--dtype bfloat16] [--only W1-8 W2 …] [--write]

W1: 32 tokens in, 128 out, at 1, 8 and 32 at once; W2: 512 in, 64 out, 8 at once; W3: a shared prefix of 512 tokens and
16 of its own in, 32 out, 8 at once. GPT-2 124M with random weights and a tokenizer trained here. One server runs at a
time, on this machine's loopback; leave the machine alone meanwhile. `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import torch
from load import Measured, Workload, measure, prompts_of
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
WORKLOADS = {
    "W1-1": Workload("W1-1", 1, 8, 32, 128), "W1-8": Workload("W1-8", 8, 48, 32, 128),
    "W1-32": Workload("W1-32", 32, 128, 32, 128), "W2": Workload("W2", 8, 32, 512, 64),
    "W3": Workload("W3", 8, 32, 16, 32, shared_tokens=512),
}  # fmt: skip
# A rival that answers one at a time would take an hour for what the others do in a minute.
FEWER = {"naive": 8}
START_SECONDS, STOP_SECONDS = 300.0, 60.0
OURS = "tritonlm"
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


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def command_of(server: str, folder: Path, dtype: str, port: int) -> list[str]:
    if server == OURS:
        ports = [f"--{door}-port={free_port()}" for door in ("http", "grpc", "metrics")]
        return [
            *(sys.executable, "-m", "tritonlm.cli", "serve", "--checkpoint", f"model={folder}", "--dtype", dtype),
            *("--port", str(port), *ports, "--no-training"),
        ]
    if server == "naive":
        script = Path(__file__).with_name("naive_server.py")
        return [sys.executable, str(script), str(folder), "--port", str(port), "--dtype", dtype]
    return [
        *(str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1"),
        *("--port", str(port), "--device", "cpu", "--dtype", dtype, "--continuous-batching"),
    ]


@contextlib.contextmanager
def running(server: str, folder: Path, dtype: str) -> Iterator[str]:
    """The address of a server that answers; stopped in the end."""
    port, log = free_port(), FOLDER / f"{server}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command_of(server, folder, dtype, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server} does not start; see {log}")
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=2).is_success
    except httpx.TransportError:
        return False


def turn(server: str, folder: Path, dtype: str, works: Sequence[Workload], seed: int) -> dict[str, Measured]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = "model" if server == OURS else str(folder)
    found: dict[str, Measured] = {}
    with running(server, folder, dtype) as url:
        warm_up = Workload("warm-up", 1, 1, 8, 8)
        measure(url, model, warm_up, prompts_of(warm_up, tokenizer, seed))
        for work in works:
            prompts = prompts_of(work, tokenizer, seed)[: FEWER.get(server)]
            found[work.name] = measure(url, model, work, prompts)
            stderr.print(f"{server}, turn {seed + 1}: {work.name} {found[work.name].speed:,.0f} tokens/s")
    return found


def table(rival: str, turns: dict[str, list[dict[str, Measured]]], works: Sequence[Workload], dtype: str) -> str:
    rows = [
        f"| | tritonlm, tokens/s | {rival}, tokens/s | ratio | first text, ms | {rival}'s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for work in works:
        ours, theirs = ([found[work.name] for found in turns[server]] for server in (OURS, rival))
        speeds = [statistics.mean(measured.speed for measured in side) for side in (ours, theirs)]
        firsts = [statistics.mean(measured.first_milliseconds for measured in side) for side in (ours, theirs)]
        rows.append(
            f"| {work.name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[0] / speeds[1]:.2f} | {firsts[0]:,.0f} | "
            f"{firsts[1]:,.0f} |"
        )
    about = (
        f"GPT-2 124M, random weights, {dtype}, {os.cpu_count()} cores ({_processor()}), {time.strftime('%Y-%m-%d')}."
    )
    return "\n".join([about, "", *rows])


def _processor() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    kinds = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{name}\b", flags)]
    return kinds[0] if kinds else "no vector units that are known here"


def write(rival: str, text: str) -> None:
    """In the place of this rival's last table."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {rival} -->", f"<!-- end of {rival} -->"
    head, _, rest = page.partition(begin)
    PAGE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", choices=["naive", "transformers"], required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    folder, works = make_checkpoint(options.dtype), [WORKLOADS[name] for name in options.only]
    turns: dict[str, list[dict[str, Measured]]] = {OURS: [], options.against: []}
    for number in range(options.turns):
        for server in (OURS, options.against):
            turns[server].append(turn(server, folder, options.dtype, works, number))
    text = table(options.against, turns, works, options.dtype)
    print(text)
    if options.write:
        write(options.against, text)


if __name__ == "__main__":
    main()
