"""Tokens per second of the engine alone, beside `transformers.generate` on the same checkpoint in the same run.

    scripts/bench engine [--dtype bfloat16] [--batch 1 8 32] [--prompt-tokens 128] [--new-tokens 64]

The checkpoint is GPT-2 124M with random weights, made once. Both sides get the same prompts, take turns, and count only
what all of a batch's sequences compute together; equal lengths are the best case for `generate`, which pads. It knows
nothing of Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# Another process beside a spinning OpenMP team makes both slow; the models' processes are started like this too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, GenerationMixin, GPT2Config, GPT2LMHeadModel
from tritonlm.contract import GenerationRequest, SamplingParameters

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))

from engine.config import EngineConfig  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.request import Request  # noqa: E402
from engine.runners import open_runner  # noqa: E402

FOLDER = ROOT / ".cache" / "benchmarks" / "gpt2-124m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of GPT-2 124M, those that every token passes through: all but the positions.
PARAMETERS = 123_653_376
Prompts = list[list[int]]


@dataclass(frozen=True)
class Seconds:
    prefill: float
    decode: float


@dataclass(frozen=True)
class Row:
    batch: int
    stage: str
    engine: float
    transformers: float

    @property
    def ratio(self) -> float:
        return self.engine / self.transformers


def make_checkpoint() -> Path:
    """GPT-2 124M with random weights and one word for each token id."""
    if not (FOLDER / "tokenizer.json").exists():
        torch.manual_seed(0)
        config = GPT2Config()
        GPT2LMHeadModel(config).save_pretrained(FOLDER)
        tokenizer = Tokenizer(models.WordLevel({f" w{i}": i for i in range(config.vocab_size)}, unk_token=" w0"))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(FOLDER / "tokenizer.json"))
    return FOLDER


@dataclass(frozen=True)
class Limits:
    """What this machine can do at best, measured beside the rest: bytes read and operations in products, a second."""

    read: float
    products: float

    @classmethod
    def measured(cls, dtype: torch.dtype) -> Limits:
        memory = torch.ones(2**28, dtype=torch.uint8)
        numbers = memory.view(torch.int64)
        read = _best_of(numbers.sum)
        size = 2048
        left, right = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
        return cls(memory.nbytes / read, 2 * size**3 / _best_of(lambda: left @ right))

    def share(self, row: Row, parameters: int, dtype: torch.dtype) -> float:
        """Of the tighter of the two: each step reads all weights once, each token takes two operations a weight."""
        by_products = self.products / (2 * parameters)
        if row.stage == "prefill":
            return row.engine / by_products
        return row.engine / min(by_products, row.batch * self.read / (parameters * dtype.itemsize))


def _best_of(work: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


class EngineSide:
    """The engine, stepped on this thread."""

    def __init__(self, folder: Path, dtype: str, places: int, runner: str) -> None:
        config = EngineConfig(device="cpu", dtype=dtype, max_sequences=places, runner=runner)
        self.runner = open_runner(folder, config, torch.device("cpu"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._engine = Engine(
            self.runner, config, lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip), ()
        )

    def measure(self, prompts: Prompts, new_tokens: int) -> Seconds:
        wanted = SamplingParameters.from_mapping({"max_tokens": new_tokens, "temperature": 0, "seed": 0})
        ended: list[bool] = []
        requests = [
            Request(
                str(i), prompt, GenerationRequest(wanted, True), lambda _, last: ended.append(True) if last else None
            )
            for i, prompt in enumerate(prompts)
        ]
        start = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        while not all(request.started_answering for request in requests):
            self._step()
        middle = time.perf_counter()
        # Sequences whose prompt was read first are ahead: what is counted is what is left to decode from here.
        left = sum(new_tokens - request.generated for request in requests)
        while len(ended) < len(requests):
            self._step()
        scale = len(prompts) * (new_tokens - 1) / left
        return Seconds(middle - start, (time.perf_counter() - middle) * scale)

    def _step(self) -> None:
        self._engine.take_in()
        self._engine.step()
        self._engine.deliver_now()


class TransformersSide:
    def __init__(self, folder: Path, dtype: str) -> None:
        self._model: GenerationMixin = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    def measure(self, prompts: Prompts, new_tokens: int) -> Seconds:
        first = self._generate(prompts, 1)
        return Seconds(first, self._generate(prompts, new_tokens) - first)

    def _generate(self, prompts: Prompts, new_tokens: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert output.shape[1] == len(prompts[0]) + new_tokens
        return time.perf_counter() - start


def compare(arguments: argparse.Namespace, progress: Callable[[], None]) -> list[Row]:
    folder = make_checkpoint()
    ours = EngineSide(folder, arguments.dtype, max(arguments.batch), arguments.runner)
    theirs = TransformersSide(folder, arguments.dtype)
    draw = random.Random(0)

    def prompts(count: int) -> Prompts:
        return [[draw.randrange(50000) for _ in range(arguments.prompt_tokens)] for _ in range(count)]

    for side in (ours, theirs):
        side.measure(prompts(1), 4)
    rows = []
    for batch in arguments.batch:
        pairs = []
        for _ in range(arguments.repeat):
            asked = prompts(batch)
            pairs.append((ours.measure(asked, arguments.new_tokens), theirs.measure(asked, arguments.new_tokens)))
            progress()
        for stage, tokens in (
            ("prefill", batch * arguments.prompt_tokens), ("decode", batch * (arguments.new_tokens - 1)),
        ):  # fmt: skip
            engine, peer = (tokens / statistics.median(getattr(pair[side], stage) for pair in pairs) for side in (0, 1))
            rows.append(Row(batch, stage, engine, peer))
    return rows


def show(rows: list[Row], arguments: argparse.Namespace, limits: Limits) -> None:
    title = f"GPT-2 124M, random weights, {arguments.dtype}, {torch.get_num_threads()} threads; tokens/s"
    table = Table(title=title, caption=f"{arguments.prompt_tokens} tokens in, {arguments.new_tokens} out, greedy")
    for column in ("batch", "stage", "engine", "transformers.generate", "ratio", "of the limit"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        share = limits.share(row, PARAMETERS, DTYPES[arguments.dtype])
        table.add_row(
            str(row.batch),
            row.stage,
            f"{row.engine:,.0f}",
            f"{row.transformers:,.0f}",
            f"{row.ratio:.2f}",
            f"{share:.0%}",
        )
    Console().print(table)
    print(f"limits: {limits.read / 1e9:.1f} GB/s read, {limits.products / 1e9:,.0f} GFLOP/s in products of this type")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--runner", choices=["auto", "native", "reference"], default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side; the median counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(arguments.batch) * arguments.repeat)
        rows = compare(arguments, lambda: bar.advance(task))
    limits = Limits.measured(DTYPES[arguments.dtype])
    if arguments.json:
        print(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows]))
    else:
        show(rows, arguments, limits)


if __name__ == "__main__":
    main()
