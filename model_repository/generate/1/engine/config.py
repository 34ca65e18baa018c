"""The settings of the engine, from the model's config.pbtxt (string parameters) or else from the environment.

It defines names, ranges, defaults and descriptions; a test compares docs/settings.md with them. Their effect on memory
is computed where the model is known (`kv_cache`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tritonlm.contract import CheckpointError, devices, tool_formats

ENVIRONMENT_PREFIX = "TRITONLM_"
AUTO, INT4, INT8, FP8 = "auto", "int4", "int8", "fp8"
# Weights that are quantized when they are loaded.
QUANTIZED = (INT4, INT8, FP8)
# Requests for each core from which the time between chunks grows in proportion to them, and how many times at most; and
# the same for large batches, whose steps are longer. The processes around the engine take about a millisecond of a core
# for each chunk, whatever it holds.
_FEW_PER_CORE, _FACTOR = 1.5, 6.0
_MANY_PER_CORE, _MANY_FACTOR = 10.5, 12.0


def _one_of(*choices: str, meaning: str) -> Any:
    return field(default=choices[0], metadata={"choices": choices, "meaning": meaning})


def _size(meaning: str, default: int = 0) -> Any:
    return field(default=default, metadata={"size": True, "meaning": meaning})


def _number(default: float, meaning: str, lowest: float = 0, highest: float = float("inf")) -> Any:
    return field(default=default, metadata={"lowest": lowest, "highest": highest, "meaning": meaning})


@dataclass(frozen=True)
class EngineConfig:
    device: str = field(
        default=devices.AUTO,
        metadata={
            "pattern": devices.PATTERN,
            "allowed": devices.ALLOWED,
            "meaning": "devices, with one engine each; auto: every GPU, or the CPU if there is none",
        },
    )
    dtype: str = _one_of(
        "auto",
        "float32",
        "bfloat16",
        "float16",
        meaning="data type of weights and KV cache; auto: that of the checkpoint",
    )
    weights: str = _one_of(
        AUTO, "full", INT8, INT4, FP8,
        meaning="weight format: auto is the checkpoint's own, quantized matrices included; full is the dtype; int8 is "
        "int8 quantization with per-channel scales; int4 is 4 bits with a scale for 32 inputs; fp8 is 8-bit floating "
        "point (e4m3) with per-channel scales, on GPUs of compute capability 8.9 or later",
    )  # fmt: skip
    vocabulary_bits: str = _one_of(
        "8", "4", meaning="with weights int4, the bits of the embedding and of the matrix of the logits"
    )
    kv_dtype: str = _one_of(
        "auto", INT8,
        meaning="number type of keys and values in the KV cache; auto: the dtype; int8: a scale for each token and KV "
        "head, about half the memory of bfloat16",
    )  # fmt: skip
    runner: str = _one_of(
        "auto", "native", "graphs", "reference",
        meaning="the model runner: own kernels (native, on a CPU), Hugging Face's code with CUDA graphs (graphs, for "
        "GPUs) or without (reference); auto: the first that supports the checkpoint",
    )  # fmt: skip
    max_sequences: int = _number(64, "slots: how many requests run together", lowest=1)
    max_queue_size: int = _number(256, "requests that may wait for a slot; one more is refused")
    queue_seconds: float = _number(60.0, "how long a request may wait for a slot; 0: no limit")
    max_seconds: float = _number(600.0, "how long a request may take in total", lowest=1)
    kv_cache_tokens: int = _number(
        0,
        "tokens in the KV cache, which limit the context length, too; 0: the likely use, which is up to 2,048 per "
        "slot, at least one full context and at most kv_memory_share",
    )
    kv_memory_share: float = _number(
        0.5, "the largest share of the free memory for a KV cache of default size", lowest=0.01, highest=1.0
    )
    max_context_tokens: int = _number(0, "limits the context length; 0: that of the checkpoint")
    block_tokens: int = _number(16, "tokens in one block of the KV cache", lowest=1)
    prefill_tokens: int = _number(512, "most prompt tokens in one step: a long prompt must not delay the others", 1)
    decode_step_milliseconds: float = _number(
        150.0,
        "target time of a step with decoding sequences, less where these are fast; prompts get the rest; 0: no limit",
    )
    prefill_step_milliseconds: float = _number(500.0, "target time of a step with prompts only; 0: no limit")
    speculative_tokens: int = _number(
        0, "speculative decoding by prompt lookup: most draft tokens per request and step; 0: off"
    )
    multi_step_tokens: int = _number(
        16,
        "multi-step decoding: most tokens of each request that the kernels decode in one call, until a chunk is due or "
        "a request comes in; 1: off",
        lowest=1,
    )
    enable_embeddings: bool = field(
        default=False, metadata={"meaning": "whether embeddings are offered: true or false"}
    )
    adapters_file: str = field(
        default="",
        metadata={
            "path": True,
            "meaning": "the JSON file that names the LM's adapters, or a folder that holds LM.json; empty: none",
        },
    )
    max_adapters: int = _number(64, "adapters that may be loaded at once", lowest=1)
    adapter_memory: int = _size("memory for loaded adapters", default=1 << 30)
    max_adapter_rank: int = _number(256, "the largest rank of an adapter", 1, 256)
    tool_format: str = _one_of(
        tool_formats.AUTO, *tool_formats.FORMATS,
        meaning="how the checkpoint writes tool calls; auto: its tokenizer_config.json says it (tool_format), or it is "
        "recognized from the chat template",
    )  # fmt: skip
    threads: int = _number(0, "CPU threads; 0: one per core that the process may use")
    memory_budget: int = _size("memory that all models on one device may use together, such as 8GiB; 0: no limit")
    idle_unload_seconds: float = _number(0.0, "the gateway unloads a model that is idle for this time; 0: never")
    chunk_milliseconds: float = _number(
        33.0,
        "shortest time between two chunks of a stream; up to 6 times longer with more requests than cores, up to 12 "
        "times with many more; 0: none",
    )

    @classmethod
    def from_strings(cls, values: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> EngineConfig:
        """Read the settings. The model's own config wins over the environment (TRITONLM_…)."""
        config = cls()
        for spec in fields(cls):
            variable = environment_name(spec.name)
            source, text = (
                (f"config.pbtxt parameter {spec.name}", values[spec.name])
                if values.get(spec.name)
                else (variable, environment.get(variable))
            )
            if text:
                value = _read(text, source, type(getattr(config, spec.name)), spec.metadata)
                change: dict[str, Any] = {spec.name: value}
                config = replace(config, **change)
        return config

    def chunk_seconds(self, running: int, cores: int) -> float:
        """The time between two chunks of a stream, which grows with the running requests."""
        per_core = running / cores
        factor = max(1.0, min(per_core / _FEW_PER_CORE, _FACTOR), min(per_core / _MANY_PER_CORE, _MANY_FACTOR))
        return self.chunk_milliseconds / 1000 * factor


def environment_name(setting: str) -> str:
    return ENVIRONMENT_PREFIX + setting.upper()


def _read(text: str, source: str, kind: type, metadata: Mapping[str, Any]) -> str | int | float | bool:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise CheckpointError(f"{source} must be true or false (got {text!r})")
        return text.lower() in ("true", "1")
    if metadata.get("size"):
        return _read_size(text, source)
    if metadata.get("path"):
        return text
    if "pattern" in metadata:
        if not re.match(metadata["pattern"], text):
            raise CheckpointError(f"{source} must be one of {metadata['allowed']} (got {text!r})")
        return text
    if kind is str:
        if text not in metadata["choices"]:
            raise CheckpointError(f"{source} must be one of {', '.join(metadata['choices'])} (got {text!r})")
        return text
    try:
        value: int | float = int(text) if kind is int else float(text)
    except ValueError:
        value = float("nan")
    # No comparison is true for a NaN.
    if not metadata["lowest"] <= value < float("inf") or value > metadata["highest"]:
        expected = "a whole number" if kind is int else "a number"
        limit = f" and at most {metadata['highest']}" if metadata["highest"] < float("inf") else ""
        raise CheckpointError(f"{source} must be {expected} of at least {metadata['lowest']}{limit} (got {text!r})")
    return value


def _read_size(text: str, source: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)?", text.strip())
    if match is None:
        raise CheckpointError(f"{source} must be a size such as 8GiB, 500MB or a number of bytes (got {text!r})")
    unit = match[2] or "B"
    return int(float(match[1]) * (1024 if "i" in unit else 1000) ** "BKMGT".index(unit[0]))
