"""The torch profiler's table of decoding steps: which operations take the time of a step."""

from __future__ import annotations

from typing import Any

import random_models
from random_models import Shape
from stage import Options, Report
from torch.profiler import ProfilerActivity, profile

_STEPS, _ROWS = 8, 12


def run(options: Options, report: Report) -> None:
    """The second shape is Llama's: its layers have the operations that most families have."""
    shapes = random_models.shapes(options)
    shape = shapes[min(1, len(shapes) - 1)]
    batches = (1, shape.batches[1])
    engine = random_models.make_engine(shape, options, max(batches))
    for batch in batches:
        _profile(shape, batch, engine, options, report)


def _profile(shape: Shape, batch: int, engine: Any, options: Options, report: Report) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.on_gpu else [])]
    steps = engine.steps(random_models.prompts(shape, batch), 4 * _STEPS)
    while not all(request.has_first_token for request in next(steps)):
        pass
    measured = 0
    with profile(activities=activities) as recorded:
        for _ in zip(range(_STEPS), steps, strict=False):
            measured += 1
    for _ in steps:
        pass
    averages = recorded.key_averages()
    key = "self_device_time_total" if options.on_gpu else "self_cpu_time_total"
    with (options.out / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(f"{shape.name}, batch {batch}, {measured} decoding steps\n")
        file.write(averages.table(sort_by=key, row_limit=60) + "\n\n")
    rows = sorted(averages, key=lambda row: getattr(row, key), reverse=True)[:_ROWS]
    report(
        shape=shape.name, batch=batch, steps=measured,
        microseconds_per_step={row.key[:80]: round(getattr(row, key) / measured, 1) for row in rows},
    )  # fmt: skip
