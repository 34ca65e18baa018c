"""Requests with LoRA adapters beside requests without, in the engine alone.

    scripts/bench adapters --model FOLDER [--dtype bfloat16] [--count 32] [--rank 16] [--targets q_proj,v_proj all]
        [--batch 32] [--weights auto] [--rounds 3]

It makes `--count` adapters of random numbers in `--dtype`. `--batch` requests run at once, without an adapter, with one
for all, or with one each; the three alternate. It prints their tokens a second, decoding and in prompts, relative to
those without, and the memory of an adapter relative to its file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from engine_side import EngineSide
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter

ALL = "all"
MODES = ("none", "one for all", "one each")


def linear_layers(model: Path, targets: str) -> dict[str, tuple[int, int]]:
    """The (inputs, outputs) of the linear layers that adapters change, by name."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    ends = "" if targets == ALL else tuple(targets.split(","))
    layers: dict[str, tuple[int, int]] = {}
    for name, module in lm.named_modules():
        if module is lm.get_output_embeddings() or not name.endswith(ends):
            continue
        if isinstance(module, torch.nn.Linear):
            layers[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            layers[name] = (module.weight.shape[0], module.weight.shape[1])
    return layers


def write_adapter(folder: Path, layers: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype, seed: int) -> Path:
    """In PEFT's format; its effect is small, so that texts stay as long as without."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            numbers = 0.01 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = numbers.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in layers})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def measure(side: EngineSide, names: list[str], options: argparse.Namespace) -> Table:
    """The best of some rounds, of which the first, which loads the adapters, does not count."""
    rng = random.Random(0)
    best = dict.fromkeys(MODES, (0.0, 0.0))
    for number in range(options.rounds + 1):
        for mode in MODES:
            # Other prompts each time: the prefix cache does not hold them.
            prompts = [[rng.randrange(3, 30_000) for _ in range(options.prompt)] for _ in range(options.batch)]
            adapters = {"none": [""], "one for all": names[:1], "one each": names}[mode]
            chosen = [adapters[n % len(adapters)] for n in range(options.batch)]
            seconds = side.measure(prompts, options.new_tokens, adapters=chosen)
            decoded, read = options.batch * (options.new_tokens - 1), options.batch * options.prompt
            if number:
                best[mode] = tuple(map(max, best[mode], (decoded / seconds.decode, read / seconds.prefill)))
    table = Table(title=f"{options.batch} requests at once")
    for name in ("adapters", "tokens/s", "ratio", "tokens/s of prompts", "ratio"):
        table.add_column(name, justify="right")
    for mode in MODES:
        values = zip(best[mode], best[MODES[0]], strict=True)
        table.add_row(mode, *(text for value, plain in values for text in (f"{value:,.0f}", f"{value / plain:.2f}")))
    return table


def compare(model: Path, targets: str, options: argparse.Namespace, folder: Path, console: Console) -> None:
    layers, dtype, file = linear_layers(model, targets), getattr(torch, options.dtype), folder / "adapters.json"
    names = [f"adapter-{n}" for n in range(options.count)]
    for seed, name in enumerate(names):
        path = write_adapter(folder / name, layers, options.rank, dtype, seed)
        add_adapter(file, name, AdapterEntry(str(path)))
    tokens = options.batch * (options.prompt + options.new_tokens + 16)
    side = EngineSide(
        model, options.dtype, options.batch, "auto", options.weights, kv_cache_tokens=tokens, adapters_file=str(file),
        max_adapters=max(64, options.count), adapter_memory=64 << 30,
    )  # fmt: skip
    table = measure(side, names, options)
    file_bytes = (folder / names[0] / "adapter_model.safetensors").stat().st_size
    memory = side.metric_values()["adapter_bytes"] / options.count
    console.print(
        f"{options.count} adapters of rank {options.rank} on {len(layers)} layers ({targets}): a file of "
        f"{file_bytes / 1e6:.2f} MB takes {memory / 1e6:.2f} MB of memory ({memory / file_bytes:.2f})"
    )
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
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for targets in options.targets:
        with tempfile.TemporaryDirectory() as folder:
            compare(options.model, targets, options, Path(folder), Console())


if __name__ == "__main__":
    main()
