"""Which runner computes a checkpoint: kernels of our own where they can, Hugging Face's modelling code for the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from tritonlm.contract import Checkpoint, CheckpointError

from ..config import INT8, EngineConfig
from .graph_runner import GraphRunner
from .interface import Runner, choose_dtype
from .native import build
from .native.runner import NativeRunner
from .native.runner import why_not as why_not_native
from .reference import ReferenceRunner

NATIVE, GRAPHS, REFERENCE = "native", "graphs", "reference"
_HUGGING_FACE = {GRAPHS: GraphRunner, REFERENCE: ReferenceRunner}


def open_runner(folder: Path, config: EngineConfig, device: torch.device) -> Runner:
    if config.runner in _HUGGING_FACE and config.weights != INT8:
        return _HUGGING_FACE[config.runner](folder, config, device)
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    dtype = choose_dtype(config.dtype, checkpoint, device)
    reason = _why_not(checkpoint, config, device, dtype)
    library = None if reason else build.kernels()
    if library is not None:
        return NativeRunner(folder, config, device, dtype, library)
    asked = "weights int8" if config.weights == INT8 else "runner native" if config.runner == NATIVE else ""
    if asked:
        raise CheckpointError(f"{asked} cannot serve {folder}: {reason or 'the kernels cannot be compiled here'}")
    return _HUGGING_FACE[REFERENCE if device.type == "cpu" else GRAPHS](folder, config, device)


def _why_not(checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels do not compute it; empty where they do."""
    if config.runner in _HUGGING_FACE:
        return f"runner {config.runner} has no such weights; leave runner at auto"
    return "it computes on a GPU" if device.type != "cpu" else why_not_native(checkpoint, dtype)
