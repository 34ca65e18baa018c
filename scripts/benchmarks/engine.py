"""Tokens per second of the engine alone, beside `transformers.generate` on the same checkpoint in the same run.

    scripts/bench engine [--shape llama] [--dtype bfloat16] [--weights int8] [--batch 1 8 32] [--prompt-tokens 128]
    scripts/bench engine --profile [--dtype bfloat16]
    scripts/bench engine --device cuda --shape gpt2-xl|llama-8b --dtype bfloat16 --batch 1 64 256

The checkpoint is GPT-2 124M, a Llama of 135M parameters or, for GPUs, a larger one, with random weights, created once.
Both sides get the same prompts in alternation, and only steps of the whole batch count. Equal lengths are the best case
for `generate`, which pads. The machine's limits are measured before and after each run of the engine; the last columns
are the fraction of them that it reached. `--profile` prints instead the time of a step by stage, and through HTTP the
CPU time per token by process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# OpenMP threads that spin slow down every other process. The models' processes are started with the same setting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from engine_side import EngineSide, Prompts, Seconds
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, GenerationMixin, GPT2Config, LlamaConfig, PreTrainedConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "benchmarks"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    title: str
    config: PreTrainedConfig
    # Parameters of the layers, and of the LM head, which a prompt needs once.
    layers: int
    head: int
    stored: torch.dtype = torch.float32

    def step_bytes(self, batch: int, context: float, weight_bytes: int, number_bytes: int) -> float:
        """Bytes that a decoding step reads: all weights once, and each sequence's keys and values."""
        config: Any = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        cached = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
        return (self.layers + self.head) * weight_bytes + batch * context * cached * number_bytes


SHAPES = {
    "gpt2": Shape("GPT-2 124M", GPT2Config(), 85_056_000, 38_597_376),
    # The shape of SmolLM2 135M.
    "llama": Shape(
        "Llama 135M",
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        ),
        106_168_320, 28_311_552,
    ),
    "gpt2-xl": Shape("GPT-2 XL 1.5B", GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_474_560_000, 80_411_200),
    # The shape of Llama 3 8B.
    "llama-8b": Shape(
        "Llama 8B",
        LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_key_value_heads=8,
            max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        ),
        6_979_321_856, 525_336_576, torch.bfloat16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    batch: int
    stage: str
    engine: float
    transformers: float
    # Fractions of the machine's limits, measured in the same runs: matmul operations, and bytes read while decoding.
    matmul: float
    read: float | None

    @property
    def ratio(self) -> float:
        return self.engine / self.transformers


def make_checkpoint(shape: Shape) -> Path:
    """The shape with random weights and one word for each token id."""
    folder = FOLDER / shape.title.lower().replace(" ", "-")
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape.config, dtype=shape.stored).save_pretrained(folder)
        words = {f" w{i}": i for i in range(int(shape.config.vocab_size))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=" w0"))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@dataclass(frozen=True)
class Limits:
    """This machine's limits, measured during the benchmark: bytes read and matmul operations per second."""

    read: float
    matmul: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: str) -> Limits:
        """A GPU reaches its limits only with larger sizes."""
        on_gpu = device != "cpu"
        memory = torch.ones(2**32 if on_gpu else 2**28, dtype=torch.uint8, device=device)
        numbers = memory.view(torch.int64)
        read = _best_of(lambda: finished(numbers.sum(), device))
        size = 8192 if on_gpu else 2048
        left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        return cls(memory.nbytes / read, 2 * size**3 / _best_of(lambda: finished(left @ right, device)))

    def between(self, other: Limits) -> Limits:
        """The mean: a shared machine's speed changes during a measurement."""
        return Limits((self.read + other.read) / 2, (self.matmul + other.matmul) / 2)


def finished(result: object, device: str) -> object:
    """Wait for the GPU, which computes asynchronously."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return result


def _best_of(work: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class TransformersSide:
    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        self._model: GenerationMixin = model.to(device)
        self._device = device

    def measure(self, prompts: Prompts, new_tokens: int) -> Seconds:
        first = self._generate(prompts, 1)
        return Seconds(first, self._generate(prompts, new_tokens) - first)

    def _generate(self, prompts: Prompts, new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=self._device)
        start = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        finished(output, self._device)
        assert output.shape[1] == len(prompts[0]) + new_tokens
        return time.perf_counter() - start


@dataclass(frozen=True)
class Measurement:
    limits: Limits
    engine: Seconds
    transformers: Seconds


def engine_side(folder: Path, arguments: argparse.Namespace) -> EngineSide:
    slots = max(arguments.batch)
    return EngineSide(folder, arguments.dtype, slots, arguments.runner, arguments.weights, device=arguments.device)


def compare(arguments: argparse.Namespace, progress: Callable[[], None]) -> tuple[list[Row], list[Measurement]]:
    folder = make_checkpoint(SHAPES[arguments.shape])
    engine = engine_side(folder, arguments)
    transformers = TransformersSide(folder, arguments.dtype, arguments.device)
    generator = random.Random(0)

    def prompts(count: int) -> Prompts:
        return [[generator.randrange(49_000) for _ in range(arguments.prompt_tokens)] for _ in range(count)]

    for side in (engine, transformers):
        side.measure(prompts(1), 4)
    rows, all_measurements = [], []
    for batch in arguments.batch:
        measurements = []
        for _ in range(arguments.repeat):
            batch_prompts = prompts(batch)
            before = Limits.measured(DTYPES[arguments.dtype], arguments.device)
            seconds = engine.measure(batch_prompts, arguments.new_tokens)
            limits = before.between(Limits.measured(DTYPES[arguments.dtype], arguments.device))
            other = transformers.measure(batch_prompts, arguments.new_tokens)
            measurements.append(Measurement(limits, seconds, other))
            progress()
        rows += rows_of(batch, measurements, arguments)
        all_measurements += measurements
    return rows, all_measurements


def rows_of(batch: int, measurements: list[Measurement], arguments: argparse.Namespace) -> Iterator[Row]:
    shape, length, steps = SHAPES[arguments.shape], arguments.prompt_tokens, arguments.new_tokens - 1
    numbers = DTYPES[arguments.dtype].itemsize
    weight_bytes = 1 if arguments.weights == "int8" else numbers
    step_bytes = shape.step_bytes(batch, length + arguments.new_tokens / 2, weight_bytes, numbers)
    # Only a prompt's last token goes through the LM head. A multiplication and an addition are two operations.
    for stage, tokens, weights, read in (
        ("prefill", batch * length, shape.layers + shape.head / length, None),
        ("decode", batch * steps, shape.layers + shape.head, steps * step_bytes),
    ):
        engine, peer = (
            tokens / statistics.median(getattr(getattr(one, side), stage) for one in measurements)
            for side in ("engine", "transformers")
        )
        runs = [(one.limits, getattr(one.engine, stage)) for one in measurements]
        matmul = statistics.median(2 * weights * tokens / seconds / limits.matmul for limits, seconds in runs)
        bandwidth = statistics.median(read / seconds / limits.read for limits, seconds in runs) if read else None
        yield Row(batch, stage, engine, peer, matmul, bandwidth)


def show(rows: list[Row], measurements: list[Measurement], arguments: argparse.Namespace) -> None:
    weights = ", int8 weights" if arguments.weights == "int8" else ""
    model = (SHAPES[arguments.shape].title, "random weights", arguments.dtype + weights)
    hardware = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    title = f"{', '.join(model)}, {hardware}; tokens/s"
    table = Table(title=title, caption=f"{arguments.prompt_tokens} tokens in, {arguments.new_tokens} out, greedy")
    for column in ("batch", "stage", "engine", "transformers.generate", "ratio", "of matmul peak", "of bandwidth"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        speeds = (f"{row.engine:,.0f}", f"{row.transformers:,.0f}", f"{row.ratio:.2f}")
        read = "" if row.read is None else f"{row.read:.0%}"
        table.add_row(str(row.batch), row.stage, *speeds, f"{row.matmul:.0%}", read)
    Console().print(table)
    read, matmul = (statistics.median(getattr(one.limits, name) for one in measurements) for name in ("read", "matmul"))
    print(f"limits: {read / 1e9:.1f} GB/s read, {matmul / 1e9:,.0f} GFLOP/s matmul in this dtype")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--runner", choices=["auto", "native", "graphs", "reference"], default="auto")
    parser.add_argument("--weights", choices=["full", "int8"], default="full")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side; the median is reported")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time by stage, and CPU time by process",
    )
    arguments = parser.parse_args()
    if arguments.profile:
        import shares  # noqa: PLC0415 (it needs the development packages)

        folder = make_checkpoint(SHAPES[arguments.shape])
        return shares.show(engine_side(folder, arguments), arguments.batch, arguments.dtype)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(arguments.batch) * arguments.repeat)
        rows, measurements = compare(arguments, lambda: bar.advance(task))
    if arguments.json:
        # "products" is the former name of "matmul".
        print(json.dumps([{**asdict(row), "ratio": row.ratio, "products": row.matmul} for row in rows]))
    else:
        show(rows, measurements, arguments)
    return None


if __name__ == "__main__":
    main()
