"""What the engine would do with a checkpoint, without its weights: `tritonlm inspect` runs it in a process of its own.

    echo '{"NAME": ["TYPE", [SHAPE]]}' | python -m engine.inspection FOLDER

It reads the tensors of weights that are not in the folder, or `{}`. It prints JSON: the runner with the reason, the
number type, the KV cache's bytes per token, what a step reads of a weight, what this process takes, and how fast this
machine reads memory. The settings come from the environment, as the engine's do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tritonlm.contract import Checkpoint, CheckpointError, quantization
from tritonlm.contract.safetensors_header import StoredTensor

from .config import INT4, INT8, EngineConfig
from .memory import resident_memory
from .runners.loading import import_torch

# Before what imports torch, and as the engine's process does it: `process_bytes` is what that takes.
import_torch()

import torch  # noqa: E402

from .runners.interface import choose_devices, choose_dtype, weights_in_memory  # noqa: E402
from .runners.kv_cache import LIKELY_TOKENS, LayerShape, free_memory, stored_dtype  # noqa: E402
from .runners.native import families  # noqa: E402
from .runners.native.build import kernels  # noqa: E402
from .runners.native.weights import bf16_packing_pays  # noqa: E402
from .runners.select import GRAPHS, NATIVE, REFERENCE, why_not_native  # noqa: E402

# Larger than any cache of a processor; a smaller one where memory is short.
_READ_BYTES, _READ_SECONDS = 256 << 20, 0.5
# 4 bits, and a scale of 16 bits for 32 weights.
_INT4_BITS, _PACKED_BITS = 4.5, 12
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint whose weights are not in its folder, but whose tensors are known."""

    tensors: Mapping[str, StoredTensor]

    @cached_property
    def quantized(self) -> dict[str, quantization.Layout]:
        if quantization.method_of(self.config) is None:
            return {}
        try:
            return quantization.layouts(self.config, self.tensors)
        except quantization.QuantizationError as error:
            raise CheckpointError(str(error)) from None


def inspect(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, Any]:
    device = choose_devices(config.device)[0]
    dtype = choose_dtype(config.dtype, checkpoint, device)
    reason = why_not_native(checkpoint, config, device, dtype)
    bits = _bits_per_weight(checkpoint, config, dtype, is_native=not reason)
    hugging_face = REFERENCE if device.type == "cpu" else GRAPHS
    return {
        "runner": NATIVE if not reason else config.runner if config.runner in (REFERENCE, GRAPHS) else hugging_face,
        "reason": reason,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "bits_per_weight": bits,
        "read_bits_per_weight": _PACKED_BITS if not reason and _are_packed(dtype, bits) else bits,
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


def _are_packed(dtype: torch.dtype, bits: float) -> bool:
    """Whether the kernels keep these weights as lossless 12-bit bfloat16. Some matrices may have too many outliers."""
    library = kernels() if dtype == torch.bfloat16 and bits == 8 * dtype.itemsize else None
    return library is not None and bf16_packing_pays(library)


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
    folder, remote = Path(sys.argv[1]), json.load(sys.stdin)
    tensors = {name: StoredTensor(type_name, tuple(shape)) for name, (type_name, shape) in remote.items()}
    checkpoint = RemoteCheckpoint(folder, tensors) if tensors else Checkpoint(folder)
    try:
        print(json.dumps(inspect(checkpoint, EngineConfig.from_strings({}))))
    except CheckpointError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
