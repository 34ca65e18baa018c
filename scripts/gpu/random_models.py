"""Models with random weights, made on the device, and the folder that stands for their checkpoint.

Writing and reading 16 GB of weights would take a good part of a short run.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine.config import EngineConfig
from engine.runners.graph_runner import GraphRunner
from engine_side import Prompts, SteppedEngine
from reads import Cost
from stage import Options
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    name: str
    config: PreTrainedConfig
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


def _shapes() -> tuple[Shape, ...]:
    batches = (1, 64, 256)
    llama_8b = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_key_value_heads=8,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return (
        Shape("gpt2-124m", GPT2Config(**ends), batches, 128, 64),
        Shape("llama-8b", llama_8b, batches, 128, 64),
        Shape("gpt2-1.5b", GPT2Config(n_embd=1600, n_layer=48, n_head=25, **ends), batches, 128, 64),
    )


def _tiny_shapes() -> tuple[Shape, ...]:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return (Shape("llama-tiny", config, (1, 3), 8, 6),)


def shapes(options: Options) -> tuple[Shape, ...]:
    return _tiny_shapes() if options.tiny else _shapes()


def make_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def save_folder(shape: Shape, folder: Path) -> Path:
    """Configuration and a minimal tokenizer, without weights."""
    shape.config.save_pretrained(folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.config.vocab_size)}, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def make_engine(shape: Shape, options: Options, most: int, weights: str = "full") -> SteppedEngine:
    """An engine with the graph runner and slots for `most` sequences."""
    config = EngineConfig(device=options.device, dtype="bfloat16", max_sequences=most, runner="graphs", weights=weights)
    folder = save_folder(shape, options.scratch / shape.name)
    runner = GraphRunner(
        folder,
        config,
        torch.device(options.device),
        make_model=lambda dtype, device: make_model(shape.config, dtype, device),
    )
    return SteppedEngine(runner, config, lambda ids, _: "".join(f" w{i}" for i in ids))


def cost_of(shape: Shape) -> Cost:
    """What a step reads, from the shapes of the model's tensors; no memory is taken for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=DTYPE)
    # Tied weights count once, as in a file.
    tensors = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return Cost.of_shapes(tensors, shape.config)


def prompts(shape: Shape, batch: int) -> Prompts:
    source = random.Random(batch)
    return [[source.randrange(shape.config.vocab_size) for _ in range(shape.prompt_tokens)] for _ in range(batch)]


def release(device: str) -> None:
    """Return the memory of what is not referenced any more, before the next model is made."""
    # A runner and its model refer to each other.
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
