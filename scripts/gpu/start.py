"""How long an engine takes to be ready: weights of an 8B model on the local disk, read, moved and recorded."""

from __future__ import annotations

import time

import random_models
import torch
from engine.config import EngineConfig
from engine.runners.graph_runner import GraphRunner
from random_models import DTYPE
from stage import Options, Report


def run(options: Options, report: Report) -> None:
    shapes = random_models.shapes(options)
    shape = shapes[min(1, len(shapes) - 1)]
    folder = random_models.save_folder(shape, options.scratch / f"start-{shape.name}")
    began = time.perf_counter()
    model = random_models.make_model(shape.config, DTYPE, torch.device(options.device))
    model.save_pretrained(folder)
    written = time.perf_counter() - began
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    del model
    random_models.release(options.device)
    report(shape=shape.name, bytes=size, written_seconds=round(written, 2))
    began = time.perf_counter()
    config = EngineConfig(device=options.device, dtype="bfloat16", runner="graphs")
    runner = GraphRunner(folder, config, torch.device(options.device))
    # The files have just been written, so they are in the page cache.
    report(
        shape=shape.name, ready_seconds=round(time.perf_counter() - began, 2), page_cache="warm",
        recorded_shapes=len(runner.graphs.recordings), memory_bytes=runner.memory.resident,
    )  # fmt: skip
