"""Tokens per second of the engine alone, with the share of the device's limits that are measured beside them."""

from __future__ import annotations

import time
from typing import Any

import random_models
import torch
from machine_limits import Limits
from random_models import DTYPE, Shape
from stage import Options, Report

# A batch is measured only when this much of the stage's time is left.
_LEAST_SECONDS = 12.0
# 4-bit weights have a scale of 16 bits for 32 of them.
WEIGHT_BYTES = {"full": DTYPE.itemsize, "int8": 1.0, "fp8": 1.0, "int4": 0.5625}


def run(options: Options, report: Report) -> None:
    limits = Limits.measured(DTYPE, options.device)
    report(bandwidth_gb_s=round(limits.read / 1e9, 1), matmul_tflop_s=round(limits.matmul / 1e12, 2), dtype=str(DTYPE))
    random_models.release(options.device)
    for shape in random_models.shapes(options):
        if options.left() < _LEAST_SECONDS:
            report(shape=shape.name, skipped="no time left")
            continue
        measure_shape(shape, options, limits, report)
        random_models.release(options.device)


def measure_shape(shape: Shape, options: Options, limits: Limits, report: Report, weights: str = "full") -> None:
    began = time.perf_counter()
    engine = random_models.make_engine(shape, options, max(shape.batches), weights)
    runner: Any = engine.runner
    report(
        shape=shape.name, weights=weights, made_seconds=round(time.perf_counter() - began, 2),
        recorded_shapes=len(runner.graphs.recordings),
        recorded_prompts=len(runner.prompt_graphs.recordings) if runner.prompt_graphs else 0,
        attention="in place" if runner.in_place else "gathered",
        kv_cache_tokens=runner.blocks * 16, memory_bytes=runner.memory.resident,
    )  # fmt: skip
    cost = random_models.cost_of(shape)
    engine.measure(random_models.prompts(shape, 1), 4)
    for batch in shape.batches:
        if options.left() < _LEAST_SECONDS:
            report(shape=shape.name, batch=batch, skipped="no time left")
            continue
        began = time.perf_counter()
        seconds = engine.measure(random_models.prompts(shape, batch), shape.new_tokens)
        total = time.perf_counter() - began
        steps = shape.new_tokens - 1
        context = shape.prompt_tokens + shape.new_tokens / 2
        read = steps * cost.step_bytes(batch, context, WEIGHT_BYTES[weights], DTYPE.itemsize)
        operations = cost.operations(batch * shape.prompt_tokens, batch)
        report(
            shape=shape.name, weights=weights, batch=batch, prompt_tokens=shape.prompt_tokens,
            new_tokens=shape.new_tokens,
            prefill_tokens_s=round(batch * shape.prompt_tokens / seconds.prefill, 1),
            decode_tokens_s=round(batch * steps / seconds.decode, 1), step_ms=round(1000 * seconds.decode / steps, 3),
            total_tokens_s=round(batch * shape.new_tokens / total, 1),
            of_bandwidth=round(read / seconds.decode / limits.read, 6),
            prefill_of_matmul=round(operations / seconds.prefill / limits.matmul, 6),
            decode_of_matmul=round(
                cost.operations(batch * steps, batch * steps) / seconds.decode / limits.matmul, 6
            ),
        )  # fmt: skip
    if options.on_gpu:
        report(shape=shape.name, peak_bytes=torch.cuda.max_memory_reserved(options.device))
