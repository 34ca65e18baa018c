"""What the engine would do with a checkpoint, without its weights: `tritonlm inspect` runs it in a process of its own.

    python -m engine.inspection FOLDER

It prints JSON: the runner with the reason, the number type, the KV cache's bytes per token, what this process takes,
and how fast this machine reads memory. The settings come from the environment, as the engine's do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tritonlm.contract import Checkpoint, CheckpointError

from .config import INT4, INT8, EngineConfig
from .memory import resident_memory
from .runners.interface import choose_devices, choose_dtype, weights_in_memory
from .runners.kv_cache import LIKELY_TOKENS, LayerShape, free_memory, stored_dtype
from .runners.native import families
from .runners.select import GRAPHS, NATIVE, REFERENCE, why_not_native

# Larger than any cache of a processor; a smaller one where memory is short.
_READ_BYTES, _READ_SECONDS = 256 << 20, 0.5
# 4 bits, and a scale of 16 bits for 32 weights.
_INT4_BITS = 4.5
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")


def inspect(folder: Path, config: EngineConfig) -> dict[str, Any]:
    checkpoint = Checkpoint(folder)
    device = choose_devices(config.device)[0]
    dtype = choose_dtype(config.dtype, checkpoint, device)
    reason = why_not_native(checkpoint, config, device, dtype)
    hugging_face = REFERENCE if device.type == "cpu" else GRAPHS
    return {
        "runner": NATIVE if not reason else config.runner if config.runner in (REFERENCE, GRAPHS) else hugging_face,
        "reason": reason,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "bits_per_weight": _bits_per_weight(checkpoint, config, dtype, is_native=not reason),
        "kv_dtype": str(stored_dtype(config, dtype)).removeprefix("torch."),
        "kv_bytes_per_token": _kv_bytes(checkpoint, config, stored_dtype(config, dtype), is_native=not reason),
        "likely_tokens": LIKELY_TOKENS,
        # Before the measurement, whose buffer is this process's too.
        "process_bytes": resident_memory(),
        "free_bytes": free_memory(device),
        "read_bytes_per_second": read_bandwidth() if device.type == "cpu" else None,
    }


def _bits_per_weight(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype, is_native: bool) -> float:
    if is_native and config.weights in (INT4, INT8):
        return _INT4_BITS if config.weights == INT4 else 8
    if is_native and (count := checkpoint.quantized_count()):
        return 8 * weights_in_memory(checkpoint, config.weights, dtype) / count
    return 8 * dtype.itemsize


def _kv_bytes(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype, is_native: bool) -> int:
    """Bytes that the KV cache holds for a token; without the kernels by config.json, 0 if that does not tell."""
    if is_native:
        program = families.write(checkpoint, max_context_tokens=config.max_context_tokens)
        layers, kv_heads, head_dim = program.shape.num_layers, program.shape.num_kv_heads, program.head_dim
        return layers * LayerShape(kv_heads, head_dim, head_dim).bytes_per_token(dtype)
    heads, layers, width = (_first(checkpoint.config, names) for names in (_HEADS, _LAYERS, _WIDTHS))
    if not heads or not layers or not width:
        return 0
    kv_heads = _first(checkpoint.config, ("num_key_value_heads", "num_kv_heads")) or heads
    head_dim = _first(checkpoint.config, ("head_dim",)) or width // heads
    return layers * LayerShape(kv_heads, head_dim, head_dim).bytes_per_token(dtype)


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def read_bandwidth() -> float:
    """Bytes per second that all cores together read from memory: the best pass within half a second."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    numbers = torch.ones(min(_READ_BYTES, max(free_memory(torch.device("cpu")) // 4, 1 << 20)) // 4)
    best, end = float("inf"), time.monotonic() + _READ_SECONDS
    while time.monotonic() < end:
        started = time.monotonic()
        numbers.sum()
        best = min(best, time.monotonic() - started)
    return numbers.nbytes / best


def main() -> None:
    try:
        print(json.dumps(inspect(Path(sys.argv[1]), EngineConfig.from_strings({}))))
    except CheckpointError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
