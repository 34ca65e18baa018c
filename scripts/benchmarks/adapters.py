"""Requests with LoRA adapters beside requests without, in the engine alone.

    scripts/bench adapters --model FOLDER [--dtype bfloat16] [--count 32] [--rank 16] [--targets q_proj,v_proj all]
        [--batch 32] [--weights auto] [--threads 0] [--rounds 4] [--processor-time]

It makes `--count` adapters of random numbers in `--dtype`. `--batch` requests run at once, without an adapter, with
one for all, or with one each; these alternate, round by round. It prints their tokens a second, decoding and in
prompts; the median of their ratios to those without in the same round, and the lowest and highest; and the memory of
an adapter relative to its file. `--processor-time` counts that instead of seconds: other programs change it less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from engine_side import EngineSide
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter

ALL, WITHOUT = "all", "none"
# The adapters of one mode, of which request n has number n modulo their count. "": none.
Modes = dict[str, Sequence[str]]
# Tokens/s in each round.
Speeds = dict[str, list[float]]


def linear_layers(model: Path) -> dict[str, tuple[int, int]]:
    """The (inputs, outputs) of the linear layers that adapters can change, by name."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers: dict[str, tuple[int, int]] = {}
    for name, module in lm.named_modules():
        if module is lm.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):
            layers[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            layers[name] = (module.weight.shape[0], module.weight.shape[1])
    return layers


class AdapterWriter:
    """Writes adapters in PEFT's format; their effect is small, so that texts stay as long as without."""

    def __init__(self, layers: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype) -> None:
        self._layers, self._rank = layers, rank
        self._largest = rank * max(max(shape) for shape in layers.values())
        # Each matrix is a window of these: to make all numbers anew takes longer than the benchmark.
        self._numbers = (0.01 * torch.randn(4 * self._largest, generator=torch.Generator().manual_seed(0))).to(dtype)

    def write(self, folder: Path, seed: int) -> int:
        """Returns the size of the file with the matrices."""
        folder.mkdir()
        rng, tensors = random.Random(seed), {}
        for name, (inputs, outputs) in self._layers.items():
            for part, (rows, columns) in (("A", (self._rank, inputs)), ("B", (outputs, self._rank))):
                begin = rng.randrange(len(self._numbers) - rows * columns)
                window = self._numbers[begin : begin + rows * columns].clone().view(rows, columns)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = window
        save_file(tensors, folder / "adapter_model.safetensors")
        targets = sorted({name.rpartition(".")[2] for name in self._layers})
        settings = {"peft_type": "LORA", "r": self._rank, "lora_alpha": 2 * self._rank, "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return (folder / "adapter_model.safetensors").stat().st_size


def measure(side: EngineSide, modes: Modes, options: argparse.Namespace) -> tuple[Speeds, Speeds]:
    """Of decoding, and of prompts."""
    rng = random.Random(0)
    decoding: Speeds = {mode: [] for mode in modes}
    reading: Speeds = {mode: [] for mode in modes}
    clock = time.process_time if options.processor_time else time.perf_counter
    for _ in range(options.rounds):
        for mode, names in modes.items():
            # Other prompts each time: the prefix cache does not hold them.
            prompts = [[rng.randrange(3, 30_000) for _ in range(options.prompt)] for _ in range(options.batch)]
            chosen = [names[n % len(names)] for n in range(options.batch)]
            seconds = side.measure(prompts, options.new_tokens, adapters=chosen, clock=clock)
            decoding[mode].append(options.batch * (options.new_tokens - 1) / seconds.decode)
            reading[mode].append(options.batch * options.prompt / seconds.prefill)
    return decoding, reading


def cells(speeds: Speeds, mode: str) -> Iterator[str]:
    ratios = [with_ / without for with_, without in zip(speeds[mode], speeds[WITHOUT], strict=True)]
    yield f"{statistics.median(speeds[mode]):,.0f}"
    yield f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if mode != WITHOUT else ""


class TargetSet:
    """Adapters of some layers."""

    def __init__(self, targets: str, layers: dict[str, tuple[int, int]], options: argparse.Namespace) -> None:
        ends = "" if targets == ALL else tuple(targets.split(","))
        self._layers = {name: shape for name, shape in layers.items() if name.endswith(ends)}
        self._rank, self._dtype, self._file_bytes = options.rank, getattr(torch, options.dtype), 0
        self.targets, self.names = targets, [f"{targets.replace(',', '-')}-{n}" for n in range(options.count)]

    def write(self, folder: Path, adapters_file: Path) -> None:
        writer = AdapterWriter(self._layers, self._rank, self._dtype)
        for seed, name in enumerate(self.names):
            self._file_bytes = writer.write(folder / name, seed)
            add_adapter(adapters_file, name, AdapterEntry(str(folder / name)))

    def load(self, side: EngineSide) -> str:
        """Load them by a request each; describe their memory."""
        before = side.metric_values()["adapter_bytes"]
        side.measure([[3, 4, 5]] * len(self.names), 2, adapters=self.names)
        memory = (side.metric_values()["adapter_bytes"] - before) / len(self.names)
        return (
            f"{len(self.names)} adapters of rank {self._rank} on {len(self._layers)} layers ({self.targets}): a file "
            f"of {self._file_bytes / 1e6:.2f} MB takes {memory / 1e6:.2f} MB of memory "
            f"({memory / self._file_bytes:.2f})"
        )


def compare(options: argparse.Namespace, folder: Path, console: Console) -> None:
    file, layers = folder / "adapters.json", linear_layers(options.model)
    sets = [TargetSet(targets, layers, options) for targets in options.targets]
    modes: Modes = {WITHOUT: [""]}
    for each in sets:
        each.write(folder, file)
        modes |= {f"{each.targets}: one for all": each.names[:1], f"{each.targets}: one each": each.names}
    tokens = options.batch * (options.prompt + options.new_tokens + 16)
    side = EngineSide(
        options.model, options.dtype, options.batch, "auto", options.weights, kv_cache_tokens=tokens,
        adapters_file=str(file), max_adapters=len(sets) * options.count, adapter_memory=64 << 30,
        threads=options.threads,
    )  # fmt: skip
    for each in sets:
        console.print(each.load(side))
    decoding, reading = measure(side, modes, options)
    clock = "processor time" if options.processor_time else "time"
    table = Table(title=f"{options.batch} requests at once; tokens per second of {clock}, medians of {options.rounds}")
    for name in ("adapters", "decoding", "ratio", "prompts", "ratio"):
        table.add_column(name, justify="right")
    for mode in modes:
        table.add_row(mode, *cells(decoding, mode), *cells(reading, mode))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--weights", default="auto", help="auto, full, int8 or int4")
    parser.add_argument("--count", type=int, default=32, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*", default=["q_proj,v_proj", ALL], help="ends of names of layers, or all")
    parser.add_argument("--batch", type=int, default=32, help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0, help="of the kernels; 0: one for each core")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--processor-time", action="store_true", help="count processor time instead of seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder), Console(width=120))


if __name__ == "__main__":
    main()
