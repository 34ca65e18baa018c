"""Which runner computes a checkpoint: kernels of our own where they can, Hugging Face's modelling code for the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from tritonlm.contract import Checkpoint, CheckpointError

from .config import EngineConfig
from .model_runner import ModelRunner, Runner, choose_dtype
from .native import build, gpt2

NATIVE, REFERENCE = "native", "reference"


def open_runner(folder: Path, config: EngineConfig, device: torch.device) -> Runner:
    if config.runner == REFERENCE:
        return ModelRunner(folder, config, device)
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    dtype = choose_dtype(config.dtype, checkpoint, device)
    reason = "it computes on a GPU" if device.type != "cpu" else gpt2.why_not(checkpoint, dtype)
    library = None if reason else build.kernels()
    if library is not None:
        return gpt2.Gpt2Runner(folder, config, device, dtype, library)
    if config.runner == NATIVE:
        raise CheckpointError(f"runner native cannot serve {folder}: {reason or 'the kernels cannot be compiled here'}")
    return ModelRunner(folder, config, device)
