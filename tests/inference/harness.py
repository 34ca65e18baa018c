"""Runs an engine step by step on the test's thread, and makes tiny random-weight models of every family."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine.config import EngineConfig
from engine.constraints.compiler import ConstraintCompiler
from engine.engine import Engine
from engine.fleet import EngineInterface
from engine.request import Request
from engine.runners.interface import choose_devices
from engine.runners.select import open_runner
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM
from tritonlm.contract import Checkpoint, Chunk, GenerationRequest, SamplingParameters, TokenLogprob, TritonLMError

VOCABULARY = 96
# All tests here pass with every runner: TRITONLM_RUNNER=reference scripts/test tests/inference
RUNNER = os.environ.get("TRITONLM_RUNNER", "auto")
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_WIDE = {**_SMALL, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
             "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2},
    "gpt_neox": {**_SMALL, "rotary_pct": 0.5},
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 32, "init_std": 0.2,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 24},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "phi": {**_SMALL, "partial_rotary_factor": 0.5},
    "gemma2": {**_GROUPED, "sliding_window": 24, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GROUPED, "sliding_window": 24, "query_pre_attn_scalar": 8},
    "gpt_bigcode": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
                    "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2},
    "olmo2": _GROUPED,
    # Wide enough for the native kernels.
    "llama wide": _WIDE, "qwen2 wide": _WIDE, "qwen3 wide": _WIDE, "mistral wide": {**_WIDE, "sliding_window": None},
}  # fmt: skip


def save_model(family: str, folder: Path) -> Path:
    """Save a random-weight float32 model of the family, with a minimal tokenizer that passes the checks."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split(maxsplit=1)[0], **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")).save(
        str(folder / "tokenizer.json")
    )
    return folder


@dataclass
class Collected:
    """Collects the items that one request receives."""

    items: list[Chunk | TritonLMError] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    def deliver(self, item: Chunk | TritonLMError, last: bool) -> None:
        self.items.append(item)
        self.ends.append(last)

    @property
    def error(self) -> TritonLMError:
        """The one error that ended the request."""
        assert self.ends.count(True) == 1
        assert self.ends[-1]
        assert isinstance(self.items[-1], TritonLMError), self.items
        return self.items[-1]

    @property
    def chunks(self) -> list[Chunk]:
        assert self.ends.count(True) == 1
        assert self.ends[-1], "an item follows the last one"
        chunks = [item for item in self.items if isinstance(item, Chunk)]
        assert len(chunks) == len(self.items), self.items
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        return chunks

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for chunk in self.chunks for entry in chunk.logprobs or []]

    @property
    def final(self) -> Chunk:
        return self.chunks[-1]


def make_engine(folder: Path, **settings: Any) -> Engine:
    # A chunk per token, without a time between them.
    defaults = {"max_sequences": 32, "block_tokens": 4, "runner": RUNNER, "chunk_milliseconds": 0.0}
    config = EngineConfig(**{**defaults, **settings})
    runner = open_runner(folder, config, choose_devices(config.device)[0])
    return Engine(runner, config, lambda ids, _: "".join(f" {i}" for i in ids), ())


def make_text_engine(folder: Path, **settings: Any) -> tuple[Engine, Tokenizer]:
    """An engine that knows its checkpoint's tokenizer, so that it offers structured outputs."""
    checkpoint, tokenizer = Checkpoint(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    defaults = {"max_sequences": 32, "block_tokens": 4, "runner": RUNNER, "chunk_milliseconds": 0.0}
    config = EngineConfig(**{**defaults, **settings})
    runner = open_runner(folder, config, choose_devices(config.device)[0])
    ends = checkpoint.eos_token_ids
    compiler = ConstraintCompiler(checkpoint.tokenizer_file, checkpoint.vocab_size, ends)

    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    return Engine(runner, config, decode, ends, constraints=compiler), tokenizer


def submit(
    engine: EngineInterface, prompt: list[int], stream: bool = False, request_id: str = "", **parameters: Any
) -> Collected:
    params = SamplingParameters.from_mapping(
        {"max_tokens": 12, "temperature": 0, "seed": 7, "return_token_ids": True, **parameters}
    )
    collected = Collected()
    request = Request(request_id, prompt, GenerationRequest(params, stream), collected.deliver)
    engine.submit(request)
    return collected


def forward_methods(engine: Engine) -> dict[str, Callable[..., Any]]:
    """The methods with which the engine's runner computes a step."""
    names = ("forward", "forward_async")
    return {name: getattr(engine.runner, name) for name in names if hasattr(engine.runner, name)}


def step(engine: Engine) -> bool:
    """Run one step, deliver its items, and check the invariants of the block pool."""
    engine._intake.wait_for_prepared(60)
    engine.process_inbox()
    worked = engine.step()
    engine.deliver_now()
    engine.pool.check()
    return worked


def run(engine: Engine, most_steps: int = 5000) -> None:
    """Run steps until all requests have ended."""
    for _ in range(most_steps):
        if not step(engine):
            assert engine.reports.status()["running"] == engine.reports.status()["waiting"] == 0
            assert engine.pool.used == 0
            return
    raise AssertionError(f"still busy after {most_steps} steps: {engine.reports.status()}")
