"""Selects the runner of a checkpoint: the native kernels if they support it, else Hugging Face's modelling code."""

from __future__ import annotations

from pathlib import Path

import torch
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.load_progress import LoadProgress

from ..config import FP8, INT8, QUANTIZED, EngineConfig
from .graph_runner import GraphRunner
from .interface import Runner, choose_dtype
from .native import build
from .native.gguf_source import holds_gguf
from .native.runner import NativeRunner, unsupported_reason
from .reference import ReferenceRunner

NATIVE, GRAPHS, REFERENCE = "native", "graphs", "reference"
_HUGGING_FACE = {GRAPHS: GraphRunner, REFERENCE: ReferenceRunner}


def open_runner(
    folder: Path, config: EngineConfig, device: torch.device, load_progress: LoadProgress | None = None
) -> Runner:
    if config.weights == FP8 and device.type == "cpu":
        raise CheckpointError("weights fp8 need a GPU of compute capability 8.9 or later; use weights int8 on a CPU")
    # Weights are quantized at load on a CPU by the native kernels alone, on a GPU by the graph runner alone.
    if config.runner in _HUGGING_FACE and (config.weights not in QUANTIZED or device.type != "cpu"):
        _refuse_gguf(folder, f"runner {config.runner} does not read it; set runner to auto")
        return _HUGGING_FACE[config.runner](folder, config, device, load_progress)
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    dtype = choose_dtype(config.dtype, checkpoint, device)
    reason = why_not_native(checkpoint, config, device, dtype)
    library = None if reason else build.kernels()
    if library is not None:
        return NativeRunner(folder, config, device, dtype, library, load_progress)
    if setting := _native_setting(config, device):
        raise CheckpointError(f"{setting} cannot serve {folder}: {reason or 'the kernels cannot be compiled here'}")
    _refuse_gguf(folder, f"only the kernels read it, and {reason or 'they cannot be compiled here'}")
    return _HUGGING_FACE[REFERENCE if device.type == "cpu" else GRAPHS](folder, config, device, load_progress)


def _native_setting(config: EngineConfig, device: torch.device) -> str:
    """The setting that needs the native kernels; empty if there is none."""
    if config.weights in QUANTIZED and device.type == "cpu":
        return f"weights {config.weights}"
    return "runner native" if config.runner == NATIVE else ""


def _refuse_gguf(folder: Path, reason: str) -> None:
    if holds_gguf(folder):
        raise CheckpointError(f"the GGUF file of {folder} cannot be served: {reason}")


def why_not_native(checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why the native kernels do not support it; empty if they do."""
    if config.runner in _HUGGING_FACE:
        return f"runner {config.runner} does not support {config.weights} weights; set runner to auto"
    if device.type != "cpu":
        return "it computes on a GPU"
    if config.kv_dtype == INT8 and config.block_tokens % 2:
        return f"kv_dtype int8 needs an even block_tokens (got {config.block_tokens})"
    return unsupported_reason(checkpoint, dtype, config.max_context_tokens)
