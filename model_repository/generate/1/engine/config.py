"""The engine's settings: from the model's config.pbtxt (string parameters), else from the environment (all models).

It knows names, ranges, defaults and meanings, which docs/settings.md is held to; what they mean for memory is decided
where the model is known (`kv_cache`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tritonlm.contract import CheckpointError, devices

ENVIRONMENT_PREFIX = "TRITONLM_"
INT8 = "int8"
# The time between chunks begins to grow with so many running requests, up to so many times; and with a crowd once more,
# for which a step takes longer than that: all streams together then send as many chunks a second however many they are.
_CALM, _LONG = 6, 3.0
_CROWD, _LONGEST = 21, 12.0


def _one_of(*choices: str, meaning: str) -> Any:
    return field(default=choices[0], metadata={"choices": choices, "meaning": meaning})


def _size(meaning: str) -> Any:
    return field(default=0, metadata={"size": True, "meaning": meaning})


def _number(default: float, meaning: str, lowest: float = 0, highest: float = float("inf")) -> Any:
    return field(default=default, metadata={"lowest": lowest, "highest": highest, "meaning": meaning})


@dataclass(frozen=True)
class EngineConfig:
    device: str = field(
        default=devices.AUTO,
        metadata={
            "pattern": devices.PATTERN,
            "allowed": devices.ALLOWED,
            "meaning": "where to compute, an engine on each; auto: every GPU, or the CPU where there is none",
        },
    )
    dtype: str = _one_of(
        "auto", "float32", "bfloat16", "float16", meaning="number type of weights and cache; auto: the checkpoint's"
    )
    weights: str = _one_of(
        "full", INT8,
        meaning="how weights are kept and multiplied: full, as the number type says; int8, in eight bits",
    )  # fmt: skip
    runner: str = _one_of(
        "auto", "native", "graphs", "reference",
        meaning="what computes: kernels of our own (native, on a CPU), Hugging Face's code with recorded steps "
        "(graphs, for GPUs) or as it is (reference); auto: the first that can",
    )  # fmt: skip
    max_sequences: int = _number(64, "places: how many requests run together", lowest=1)
    max_queue_size: int = _number(256, "requests that may wait for a place; one more is refused")
    queue_seconds: float = _number(60.0, "how long a request may wait for a slot; 0: no limit")
    max_seconds: float = _number(600.0, "how long a request may take altogether", lowest=1)
    kv_cache_tokens: int = _number(
        0,
        "tokens in the KV cache; 0: likely use, which is up to 2,048 for each slot, at least one whole context, and no "
        "more than kv_memory_share",
    )
    kv_memory_share: float = _number(
        0.5, "share of the free memory that a KV cache of default size may take at most", lowest=0.01, highest=1.0
    )
    max_context_tokens: int = _number(0, "lowers the checkpoint's context; 0: as the checkpoint says")
    block_tokens: int = _number(16, "tokens in one block of the KV cache", lowest=1)
    prefill_tokens: int = _number(512, "prompt tokens in one step at most: a long prompt must not stop the others", 1)
    decode_step_milliseconds: float = _number(
        150.0,
        "how long a step may take in which sequences decode; prompts get what is left, a block at least; 0: no limit",
    )
    prefill_step_milliseconds: float = _number(500.0, "how long a step of prompts alone may take; 0: no limit")
    speculative_tokens: int = _number(
        0, "tokens guessed ahead of each request, at most, from what stands in its text already; 0: none"
    )
    enable_embeddings: bool = field(default=False, metadata={"meaning": "whether prompts are embedded: true or false"})
    threads: int = _number(0, "torch's threads; 0: one for each core that the process may use")
    memory_budget: int = _size("memory that all models on one device may take together, such as 8GiB; 0: no limit")
    idle_unload_seconds: float = _number(0.0, "after so long without a request the gateway unloads it; 0: never")
    chunk_milliseconds: float = _number(
        33.0,
        "least time between two chunks of a stream, thirty a second; 3 times with many requests, up to 12 with hundreds"
        "; 0: none",
    )

    @classmethod
    def from_strings(cls, values: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> EngineConfig:
        """Read the settings that are named here; the model's own config wins over the environment (TRITONLM_…)."""
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

    def chunk_seconds(self, running: int) -> float:
        """Between two chunks of a stream: with more requests steps take longer, while a chunk costs what it cost."""
        times = max(1.0, min(running / _CALM, _LONG), min(running / _CROWD, _LONGEST))
        return self.chunk_milliseconds / 1000 * times


def environment_name(setting: str) -> str:
    return ENVIRONMENT_PREFIX + setting.upper()


def _read(text: str, source: str, kind: type, metadata: Mapping[str, Any]) -> str | int | float | bool:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise CheckpointError(f"{source} must be true or false (got {text!r})")
        return text.lower() in ("true", "1")
    if metadata.get("size"):
        return _read_size(text, source)
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
    # No comparison holds for a NaN.
    if not metadata["lowest"] <= value < float("inf") or value > metadata["highest"]:
        what = "a whole number" if kind is int else "a number"
        most = f" and at most {metadata['highest']}" if metadata["highest"] < float("inf") else ""
        raise CheckpointError(f"{source} must be {what} of at least {metadata['lowest']}{most} (got {text!r})")
    return value


def _read_size(text: str, source: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)?", text.strip())
    if found is None:
        raise CheckpointError(f"{source} must be a size such as 8GiB, 500MB or a number of bytes (got {text!r})")
    unit = found[2] or "B"
    return int(float(found[1]) * (1024 if "i" in unit else 1000) ** "BKMGT".index(unit[0]))
