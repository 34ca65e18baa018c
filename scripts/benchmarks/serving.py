"""tritonlm compared with another server: same checkpoint, workloads and client, in alternation, in two rounds.

    scripts/bench serving --against vllm|llama.cpp|transformers|naive [--model gpt2|llama-1b|gemma3-270m|qwen3-0.6b|
                          olmoe-tiny] [--checkpoint FOLDER|FILE.gguf] [--dtype int8] [--only W1-8 W2 …] [--write]

W1: 32 prompt tokens, 128 output tokens, concurrency 1, 8 and 32. W2: 512 prompt, 64 output tokens, concurrency 8. W3: a
shared prefix of 512 tokens plus 16 own prompt tokens, 32 output tokens, concurrency 8. prefill: prompts of 512 tokens,
one by one. long-1, long-4: 4,000 prompt, 64 output tokens, concurrency 1 and 4; measured when `--only` names them, in a
run of their own, because servers reserve memory for a few long requests in place of many short ones. Both servers run
on this machine; llama.cpp can read the same GGUF file. Each workload runs on one server and then on the other, because
the speed of a shared machine drifts from minute to minute; the machine's limits are measured before and after, and the
processor use of the idle server is reported. Run nothing else meanwhile. A rival is installed, or built, when it is
first named.
TRITONLM_NATIVE_FLAGS (-mno-amx-bf16, -mno-avx512bf16, -mno-avx512f) restricts both servers to another kind of
processor. `--write` puts the figures into docs/performance.md, into the table of this model and kind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import processor
import rivals
import serving_report
import torch
from checkpoints import LONG_WORKLOADS, MODELS, PREFILL, WORKLOADS, Model
from engine_side import stored_bytes, weight_bytes
from load import Measurement, Workload, prompts_of
from machine_limits import Limits
from reads import Cost
from rich.console import Console
from servers import INT8, OURS, STORED, Running, dtype_of, launch, running
from tokenizers import Tokenizer

# Fewer requests for a server that processes one at a time.
REQUEST_LIMITS = {"naive": 8}
# Bytes of a weight in the rivals' memory: q8_0 has a scale of two bytes for 32 weights.
_RIVAL_WEIGHT_BYTES = {INT8: 34 / 32, "bfloat16": 2.0, "float32": 4.0}
stderr = Console(stderr=True)


@dataclass
class Round:
    """The results of one server in one round of all workloads."""

    start_seconds: float = 0.0
    resident_megabytes: float = 0.0
    # The share of all cores' time that the server used while the other one was measured.
    idle_cpu_share: float = 0.0
    measurements: dict[str, Measurement] = field(default_factory=dict)
    # Those of the machine around each workload.
    limits: dict[str, Limits] = field(default_factory=dict)


def run_round(
    servers: Sequence[str], folder: Path, dtype: str, workloads: Sequence[Workload], seed: int
) -> list[Round]:
    """Run every workload on one server and then on the other; the order alternates with the seed."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rounds = [Round() for _ in servers]
    tokens = max(work.shared_tokens + work.prompt_tokens + work.max_tokens for work in workloads)
    concurrency = max(work.concurrency for work in workloads)
    with contextlib.ExitStack() as stack:
        processes = []
        for server, result in zip(servers, rounds, strict=True):
            options = rivals.options_for(server, tokens, concurrency)
            process = stack.enter_context(running(server, folder, dtype, options))
            _measure(process, Workload("first token", 1, 1, 8, 1), tokenizer, seed)
            result.start_seconds = time.monotonic() - process.started_at
            _measure(process, Workload("warm-up", 1, 1, 8, 8), tokenizer, seed)
            processes.append(process)
        order = [(0, 1), (1, 0)][seed % 2]
        idle_seconds = [0.0, 0.0]
        number_type = getattr(torch, dtype_of(dtype))
        before = Limits.measured(number_type)
        for work in workloads:
            for number in order:
                other = 1 - number
                used, start = processes[other].processor_seconds(), time.monotonic()
                measurement = _measure(processes[number], work, tokenizer, seed, REQUEST_LIMITS.get(servers[number]))
                rounds[number].measurements[work.name] = measurement
                rounds[other].idle_cpu_share += processes[other].processor_seconds() - used
                idle_seconds[other] += (time.monotonic() - start) * (os.cpu_count() or 1)
                after = Limits.measured(number_type)
                rounds[number].limits[work.name], before = before.between(after), after
                stderr.print(f"{servers[number]}, round {seed + 1}: {work.name} {measurement.speed:,.1f} tokens/s")
        for result, process, seconds in zip(rounds, processes, idle_seconds, strict=True):
            result.resident_megabytes = process.resident_megabytes()
            result.idle_cpu_share /= seconds
    return rounds


def _measure(
    server: Running, work: Workload, tokenizer: Tokenizer, seed: int, requests: int | None = None
) -> Measurement:
    return server.measure(work, prompts_of(work, tokenizer, seed)[:requests])


def summary(rounds: Sequence[Round], cost: Cost, bytes_per_weight: float, cached_bytes: int) -> serving_report.Figures:
    """The means over the rounds."""
    figures: serving_report.Figures = {
        "start, s": statistics.mean(result.start_seconds for result in rounds),
        "resident, MB": statistics.mean(result.resident_megabytes for result in rounds),
        "waiting, %": 100 * statistics.mean(result.idle_cpu_share for result in rounds),
    }
    for name in rounds[0].measurements:
        work = (WORKLOADS | LONG_WORKLOADS)[name]
        shares = [
            share_of_limit(work, result.measurements[name], result.limits[name], cost, bytes_per_weight, cached_bytes)
            for result in rounds
        ]
        figures[name] = {
            "tokens/s": statistics.mean(result.measurements[name].speed for result in rounds),
            "first text, ms": statistics.mean(result.measurements[name].first_milliseconds for result in rounds),
            "read, GB/s": statistics.mean(result.limits[name].read for result in rounds) / 1e9,
            "matmul, GFLOP/s": statistics.mean(result.limits[name].matmul for result in rounds) / 1e9,
            "of limit, %": 100 * statistics.mean(shares),
        }
    return figures


def share_of_limit(
    work: Workload, measured: Measurement, limits: Limits, cost: Cost, bytes_per_weight: float, cached_bytes: int
) -> float:
    """Decoding: bytes read of the read bandwidth. Prefill: operations of the matmul peak. The whole path counts."""
    if work.name == PREFILL:
        return measured.speed * cost.operations(work.prompt_tokens, 1) / work.prompt_tokens / limits.matmul
    rows = min(work.concurrency, len(measured.first_text))
    context = work.shared_tokens + work.prompt_tokens + work.max_tokens / 2
    step = cost.step_bytes(rows, context, bytes_per_weight, cached_bytes)
    return measured.speed / rows * step / limits.read


def run(model: Model, options: argparse.Namespace) -> dict[str, serving_report.Figures]:
    """The figures by server."""
    number_type, servers = getattr(torch, dtype_of(options.dtype)), (OURS, options.against)
    folder, workloads = model.checkpoint(dtype_of(options.dtype)), model.workloads(options.only, options.requests)
    # Install and build the rival before the measurement.
    launch(options.against, folder, options.dtype, 0)
    rounds = [run_round(servers, folder, options.dtype, workloads, number) for number in range(options.rounds)]
    own, theirs = zip(*rounds, strict=True)
    cost, cached_bytes = Cost.of(folder), number_type.itemsize
    if options.dtype == STORED:
        own_bytes = rival_bytes = stored_bytes(folder)
    else:
        own_bytes = weight_bytes(folder, number_type, INT8 if options.dtype == INT8 else "full")
        rival_bytes = _RIVAL_WEIGHT_BYTES[options.dtype]
    return {
        OURS: summary(own, cost, own_bytes, cached_bytes),
        options.against: summary(theirs, cost, rival_bytes, cached_bytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", choices=rivals.NAMES, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="in place of --model: a Hugging Face checkpoint, or a GGUF file"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", INT8], default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=sorted(WORKLOADS | LONG_WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--requests", type=int, help="at most this many requests for each workload: a smoke test")
    parser.add_argument("--rounds", "--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/performance.md")
    options = parser.parse_args()
    if options.write and (options.requests or set(options.only) & set(LONG_WORKLOADS)):
        parser.error("--write is for the page's workloads in full: leave out --requests and long prompts")
    if options.checkpoint and checkpoints.is_gguf(options.checkpoint):
        if options.against != "llama.cpp":
            parser.error(f"a GGUF file is compared with llama.cpp only, not with {options.against}")
        options.dtype = STORED
    # The matmul peak is that of the same kind of processor.
    kind = processor.kind()
    if kind.is_restricted:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", kind.rival_environment["ONEDNN_MAX_CPU_ISA"])
    model = checkpoints.of_path(options.checkpoint) if options.checkpoint else MODELS[options.model]
    figures = run(model, options)
    result = serving_report.Result.of(kind.name, model, options.against, options.dtype, figures)
    print(serving_report.table([result]))
    if options.write:
        serving_report.write(result)


if __name__ == "__main__":
    main()
