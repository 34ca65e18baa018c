"""The engine's settings: from the model's config.pbtxt (string parameters), overridden by the environment.

It knows names, ranges and defaults; what they mean for memory is decided where the model is known (`kv_cache`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tritonlm.contract import CheckpointError

ENVIRONMENT_PREFIX = "TRITONLM_"

_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
_LOWEST = {
    "max_sequences": 1, "kv_cache_tokens": 0, "block_tokens": 1, "prefill_tokens": 1, "max_queue_size": 0,
    "max_context_tokens": 0, "threads": 0, "max_seconds": 1, "queue_seconds": 0, "coalesce_milliseconds": 0,
    "coalesce_above": 0,
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    device: str = "auto"
    dtype: str = "auto"
    # Places: how many requests run together.
    max_sequences: int = 64
    # Requests that may wait for a place; the next one is refused. Triton's max_queue_size is the same number.
    max_queue_size: int = 256
    # Seconds that a request may wait for a place (0: no limit).
    queue_seconds: float = 60.0
    # Seconds that a request may take altogether.
    max_seconds: float = 600.0
    # Tokens that the KV cache holds (0: context × places, capped by free memory).
    kv_cache_tokens: int = 0
    # Lowers the checkpoint's context (0: as the checkpoint says).
    max_context_tokens: int = 0
    block_tokens: int = 16
    # Prompt tokens computed in one step at most: a long prompt does not stop the others' decoding for long.
    prefill_tokens: int = 512
    # torch's threads (0: one per core that this process may use).
    threads: int = 0
    # With more running requests than this, chunks of a stream leave at most once in so many milliseconds.
    coalesce_above: int = 8
    coalesce_milliseconds: float = 40.0

    @classmethod
    def from_strings(cls, values: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> EngineConfig:
        """Read the settings that are named here; the environment (TRITONLM_…) wins over the model's config."""
        config = cls()
        for spec in fields(cls):
            variable = ENVIRONMENT_PREFIX + spec.name.upper()
            source, text = (
                (variable, environment[variable])
                if environment.get(variable)
                else (f"config.pbtxt parameter {spec.name}", values.get(spec.name))
            )
            if text:
                value: Any = _read(spec.name, text, source, type(getattr(config, spec.name)))
                config = replace(config, **{spec.name: value})
        return config


def _read(name: str, text: str, source: str, kind: type) -> str | int | float:
    if name in _CHOICES:
        if text not in _CHOICES[name]:
            raise CheckpointError(f"{source} must be one of {', '.join(_CHOICES[name])} (got {text!r})")
        return text
    try:
        value: int | float = int(text) if kind is int else float(text)
    except ValueError:
        value = -1
    if value < _LOWEST[name]:
        raise CheckpointError(f"{source} must be a number of at least {_LOWEST[name]} (got {text!r})")
    return value
