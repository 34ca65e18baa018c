"""Tokens per second of the engine alone, beside `transformers.generate` on the same checkpoint in the same run.

    scripts/bench engine [--shape llama] [--dtype bfloat16] [--weights int8] [--batch 1 8 32] [--prompt-tokens 128]
    scripts/bench engine --checkpoint .cache/real_models/granite4-350m --dtype bfloat16
    scripts/bench engine --profile [--shape gemma3-270m] [--dtype bfloat16]
    scripts/bench engine --device cuda --shape gpt2-xl|llama-8b --dtype bfloat16 --batch 1 64 256

The checkpoint is GPT-2 124M, a Llama of 135M parameters, a model of `scripts/bench serving` or, for GPUs, a larger one,
created once. Both sides get the same prompts in alternation, and only steps of the whole batch count. Equal lengths are
the best case for `generate`, which pads. The machine's limits are measured before and after each run of the engine; the
last columns are the fraction of them that it reached, with the bytes that are really read. `--profile` prints instead
the time of a step by stage for 1, 4, 8 and 32 sequences and for a prompt of 512 tokens, with its share of the limits,
and through HTTP the CPU time per token by process.
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

# OpenMP threads that spin slow down every other process. The models' processes are started with the same setting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkpoints
import processor
import torch
from engine_side import EngineSide, Prompts, Seconds, weight_bytes
from machine_limits import Limits, finished
from reads import Cost
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
    stored: torch.dtype = torch.float32


SHAPES = {
    "gpt2": Shape("GPT-2 124M", GPT2Config()),
    # The shape of SmolLM2 135M.
    "llama": Shape(
        "Llama 135M",
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        ),
    ),
    "gpt2-xl": Shape("GPT-2 XL 1.5B", GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
    # The shape of Llama 3 8B.
    "llama-8b": Shape(
        "Llama 8B",
        LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_key_value_heads=8,
            max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        ),
        torch.bfloat16,
    ),
}  # fmt: skip
# The models of `serving`, except for GPT-2, which it makes with another tokenizer.
MODELS = {name: model for name, model in checkpoints.MODELS.items() if name not in SHAPES}


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


def title_of(arguments: argparse.Namespace) -> str:
    if arguments.checkpoint:
        return str(arguments.checkpoint.name)
    name = arguments.shape
    return MODELS[name].title if name in MODELS else f"{SHAPES[name].title}, random weights"


def make_checkpoint(arguments: argparse.Namespace) -> Path:
    """The checkpoint of a model; a shape gets random weights and one word for each token id."""
    if arguments.checkpoint:
        return Path(arguments.checkpoint)
    if arguments.shape in MODELS:
        return MODELS[arguments.shape].checkpoint(arguments.dtype)
    shape = SHAPES[arguments.shape]
    folder = FOLDER / shape.title.lower().replace(" ", "-")
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape.config, dtype=shape.stored).save_pretrained(folder)
        words = {f" w{i}": i for i in range(int(shape.config.vocab_size))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=" w0"))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


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
    folder = make_checkpoint(arguments)
    cost, bytes_per_weight = Cost.of(folder), read_bytes(folder, arguments)
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
        rows += rows_of(batch, measurements, cost, bytes_per_weight, arguments)
        all_measurements += measurements
    return rows, all_measurements


def read_bytes(folder: Path, arguments: argparse.Namespace) -> float:
    """Bytes that the engine reads for one weight."""
    dtype = DTYPES[arguments.dtype]
    if arguments.device != "cpu" or arguments.runner in ("graphs", "reference"):
        return dtype.itemsize
    return weight_bytes(folder, dtype, arguments.weights)


def rows_of(
    batch: int, measurements: list[Measurement], cost: Cost, bytes_per_weight: float, arguments: argparse.Namespace
) -> Iterator[Row]:
    length, steps = arguments.prompt_tokens, arguments.new_tokens - 1
    context, numbers = length + arguments.new_tokens / 2, DTYPES[arguments.dtype].itemsize
    step_bytes = cost.step_bytes(batch, context, bytes_per_weight, numbers)
    # Only a prompt's last token goes through the LM head.
    for stage, tokens, operations, read in (
        ("prefill", batch * length, cost.operations(batch * length, batch), None),
        ("decode", batch * steps, cost.operations(batch * steps, batch * steps), steps * step_bytes),
    ):
        engine, peer = (
            tokens / statistics.median(getattr(getattr(one, side), stage) for one in measurements)
            for side in ("engine", "transformers")
        )
        runs = [(one.limits, getattr(one.engine, stage)) for one in measurements]
        matmul = statistics.median(operations / seconds / limits.matmul for limits, seconds in runs)
        bandwidth = statistics.median(read / seconds / limits.read for limits, seconds in runs) if read else None
        yield Row(batch, stage, engine, peer, matmul, bandwidth)


def weights_of(arguments: argparse.Namespace) -> str:
    return f", {arguments.weights} weights" if arguments.weights != "full" else ""


def show(rows: list[Row], measurements: list[Measurement], arguments: argparse.Namespace) -> None:
    threads = f"{torch.get_num_threads()} threads ({processor.kind().name})"
    hardware = threads if arguments.device == "cpu" else torch.cuda.get_device_name()
    title = f"{title_of(arguments)}, {arguments.dtype}{weights_of(arguments)}, {hardware}; tokens/s"
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
    parser.add_argument("--shape", choices=[*SHAPES, *MODELS], default="gpt2")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="in place of --shape")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--runner", choices=["auto", "native", "graphs", "reference"], default="auto")
    parser.add_argument("--weights", choices=["auto", "full", "int8", "int4"], default="full")
    parser.add_argument("--batch", type=int, nargs="+", help="1 8 32; with --profile 1 4 8 32")
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
    arguments.batch = arguments.batch or ([1, 4, 8, 32] if arguments.profile else [1, 8, 32])
    if arguments.profile:
        import shares  # noqa: PLC0415 (it needs the development packages)

        folder = make_checkpoint(arguments)
        title = f"{title_of(arguments)}, {arguments.dtype}{weights_of(arguments)}, {processor.kind().name}"
        profile = shares.Profile(title, engine_side(folder, arguments), Cost.of(folder), read_bytes(folder, arguments))
        # Through HTTP, GPT-2 stands for the shapes whose tokenizers are not real.
        served = MODELS.get(arguments.shape, checkpoints.MODELS["gpt2"])
        return shares.show(profile, arguments.batch, DTYPES[arguments.dtype], served, arguments.weights)
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
