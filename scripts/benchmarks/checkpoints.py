"""The models of the benchmarks: where their checkpoints come from, and how many requests each workload has.

`gpt2` is made here, with a tokenizer trained here; the others come from `random_checkpoints` and `real_checkpoints`, or
from a folder. A benchmark gets an endless copy: without end-of-text tokens in its configuration, so that every output
has the requested length. This module does not know servers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from load import Workload
from tritonlm.checkpoints.gguf import prepare
from tritonlm.contract import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from random_checkpoints import random_checkpoint  # noqa: E402
from real_checkpoints import GEMMA3, Unavailable, checkpoint  # noqa: E402

FOLDER = ROOT / ".cache" / "benchmarks"
PREFILL = "prefill"
WORKLOADS = {
    "W1-1": Workload("W1-1", 1, 8, 32, 128), "W1-8": Workload("W1-8", 8, 48, 32, 128),
    "W1-32": Workload("W1-32", 32, 128, 32, 128), "W2": Workload("W2", 8, 32, 512, 64),
    "W3": Workload("W3", 8, 32, 16, 32, shared_tokens=512),
    PREFILL: Workload(PREFILL, 1, 8, 512, 1),
}  # fmt: skip
# Measured when they are named: not every model has the context, and servers start with room for it in place of slots.
LONG_WORKLOADS = {"long-1": Workload("long-1", 1, 4, 4000, 64), "long-4": Workload("long-4", 4, 4, 4000, 64)}
# For models whose tokens take up to ten times as long as those of GPT-2 124M.
_FEWER_REQUESTS = {"W1-1": 2, "W1-8": 8, "W1-32": 32, "W2": 8, "W3": 16, PREFILL: 4, "long-1": 2}
# A GGUF file of more bytes is a large model's.
_LARGE_FILE = 300_000_000
# The parts of a configuration that say where a text ends.
_END_KEYS = ("eos_token_id", "forced_eos_token_id")


@dataclass(frozen=True)
class Model:
    """`folder` returns the checkpoint for a number type, and makes it first if it is missing."""

    name: str
    title: str
    folder: Callable[[str], Path]
    is_large: bool = True

    def checkpoint(self, dtype: str) -> Path:
        try:
            return self.folder(dtype)
        except Unavailable as error:
            raise SystemExit(f"{self.name}: {error}") from error

    def workloads(self, names: Sequence[str] = tuple(WORKLOADS), requests: int | None = None) -> list[Workload]:
        """These workloads; `requests` limits the number of their requests."""
        fewer = _FEWER_REQUESTS if self.is_large else {}
        return [
            dataclasses.replace(work, requests=min(fewer.get(work.name, work.requests), requests or work.requests))
            for work in ((WORKLOADS | LONG_WORKLOADS)[name] for name in names)
        ]


def gpt2(dtype: str) -> Path:
    """GPT-2 124M with random weights, and a byte-level tokenizer trained on Python's own library."""
    # Slow to import, and most runs find the checkpoint in the cache.
    import torch  # noqa: PLC0415
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: PLC0415

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
        config = GPT2Config(bos_token_id=None, eos_token_id=None)
        GPT2LMHeadModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def endless(folder: Path) -> Path:
    """A copy without end-of-text tokens in its configuration: links, beside new configuration files."""
    resolved = folder.resolve()
    copy = FOLDER / f"{resolved.name}-{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}-endless"
    copy.mkdir(parents=True, exist_ok=True)
    # A server may be reading the copy: what is right stays.
    for file in resolved.iterdir():
        target = copy / file.name
        if file.name in ("config.json", "generation_config.json"):
            text = json.dumps(_without_end(json.loads(file.read_text(encoding="utf-8"))))
            if not target.exists() or target.read_text(encoding="utf-8") != text:
                target.write_text(text, encoding="utf-8")
        elif file.is_file() and not (target.is_symlink() and target.readlink() == file):
            target.unlink(missing_ok=True)
            target.symlink_to(file)
    for target in copy.iterdir():
        if not (resolved / target.name).is_file():
            target.unlink()
    return copy


def _without_end(config: dict[str, object]) -> dict[str, object]:
    """Null, not absent: a missing key would get the family's default."""
    return {**config, **{key: None for key in _END_KEYS if key in config}, "eos_token_id": None}


def _random(name: str) -> Callable[[str], Path]:
    return lambda _dtype: endless(random_checkpoint(name))


MODELS = {
    model.name: model
    for model in (
        Model("gpt2", "GPT-2 124M, random weights", gpt2, is_large=False),
        Model("llama-1b", "Llama 1.07B, random weights", _random("llama-1b")),
        Model("gemma3-270m", "Gemma 3 270M", lambda _dtype: endless(checkpoint(GEMMA3)), is_large=False),
        Model("qwen3-0.6b", "Qwen 3 0.6B, random weights", _random("qwen3-0.6b")),
        Model("olmoe-tiny", "OLMoE 0.9B (64 experts of 512, 8 for each token), random weights", _random("olmoe-tiny")),
    )
}


def of_path(path: Path) -> Model:
    """A checkpoint of one's own: a folder, or a GGUF file, which both servers read."""
    name = path.resolve().stem if is_gguf(path) else path.resolve().name
    if name in MODELS:
        raise SystemExit(f"{path} has the name of another model, {name}, and would enter its table: rename it")
    if is_gguf(path):
        is_large = path.exists() and path.stat().st_size > _LARGE_FILE
        return Model(name, f"{name}, a GGUF file", lambda _dtype: endless(_prepared(path)), is_large)
    if not (path / "config.json").exists():
        raise SystemExit(f"{path} has no config.json")
    return Model(name, name, lambda _dtype: endless(path))


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def _prepared(file: Path) -> Path:
    try:
        return prepare(file)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
