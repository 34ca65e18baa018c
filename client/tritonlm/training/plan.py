"""The training plan: names, ranges, defaults and descriptions of all options, defined once.

The plan is saved next to the checkpoints, so that an interrupted training resumes with the same options. This module
reads no training data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import TrainingError

PLAN_FILE = "plan.json"


class Sizes(BaseModel):
    """The dimensions of a GPT-2 that is trained from scratch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(default=4, ge=1, le=96)
    width: int = Field(default=256, ge=16, le=8192)
    heads: int = Field(default=4, ge=1, le=128)
    context: int = Field(default=512, ge=8, le=32_768)


class TrainingPlan(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        min_length=1,
        max_length=1000,
        description="abacus, fable, a text or JSONL file, a folder of them, or a data set on the Hugging Face Hub",
    )
    out: Path = Field(description="folder for checkpoints, record and report")
    model: str | None = Field(
        None, description="checkpoint to train further (folder or Hub id); without it: from scratch"
    )
    sizes: Sizes = Field(default_factory=Sizes, description="of a model from scratch")
    tokenizer: Literal["auto", "keep", "character", "bpe"] = Field(
        "auto", description="keep the model's, or train one on the data; auto: keep where there is a model, else bpe"
    )
    vocabulary: int = Field(2048, ge=32, le=200_000, description="size of a tokenizer trained on the data")
    steps: int = Field(1000, ge=1, le=10_000_000, description="optimiser steps")
    batch_size: int = Field(16, ge=1, le=65_536, description="sequences in a step, over all GPUs")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="highest, after the warm-up")
    warmup_steps: int = Field(100, ge=0, description="steps until the learning rate is reached")
    weight_decay: float = Field(0.01, ge=0, le=1)
    eval_steps: int = Field(200, ge=1, description="steps between evaluations and checkpoints")
    patience: int = Field(0, ge=0, description="evaluations without progress after which the training stops; 0: never")
    examples: int = Field(40_000, ge=100, le=100_000_000, description="number of examples from the built-in generators")
    seed: int = Field(0, ge=0, lt=2**32)
    mixed_precision: bool = Field(True, description="bfloat16 on GPUs that support it")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: one for each core")


PRESETS: dict[str, dict[str, Any]] = {
    "abacus": {
        "sizes": Sizes(layers=4, width=128, heads=4, context=128), "tokenizer": "character", "steps": 7000,
        "batch_size": 256, "learning_rate": 2e-3, "warmup_steps": 200, "eval_steps": 500,
    },
    "fable": {
        "sizes": Sizes(layers=3, width=256, heads=8, context=512), "vocabulary": 2048, "steps": 5000, "batch_size": 16,
        "learning_rate": 1e-3, "warmup_steps": 100, "eval_steps": 500,
    },
}  # fmt: skip


def make_plan(**values: Any) -> TrainingPlan:
    """A plan from the options that are set, with the presets of built-in data as defaults."""
    options = {name: value for name, value in values.items() if value is not None}
    try:
        return TrainingPlan(**{**PRESETS.get(str(options.get("data")), {}), **options})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise TrainingError(f"{field}: {problem['msg']} (got {problem['input']!r:.60})") from None


def read_plan(options: dict[str, Any], sizes: dict[str, int | None], resume: bool) -> TrainingPlan:
    """The plan from command-line options; with `resume`, the plan that was saved when the training started."""
    out = options.get("out")
    if resume:
        if out is None:
            raise TrainingError("out: --resume needs the folder of the training: --out FOLDER")
        changed = [name for name, value in {**options, **sizes}.items() if value is not None and name != "out"]
        if changed:
            raise TrainingError(f"{changed[0]}: a resumed training keeps its options; leave this option out")
        return _saved_plan(Path(out))
    if options.get("data") is None:
        raise TrainingError("data: name what to train on: abacus, fable, a file, a folder or a data set on the Hub")
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if sizes:
        if options.get("model") is not None:
            raise TrainingError(f"{next(iter(sizes))}: --model sets the sizes; leave this option out")
        preset = PRESETS.get(str(options["data"]), {}).get("sizes", Sizes())
        options = {**options, "sizes": {**preset.model_dump(), **sizes}}
    return make_plan(**{**options, "out": Path(out or f"runs/{Path(str(options['data'])).stem}")})


def _saved_plan(out: Path) -> TrainingPlan:
    if not (out / PLAN_FILE).is_file():
        raise TrainingError(f"out: there is no training to resume in {out}: it has no {PLAN_FILE}")
    # The folder may have been moved since the plan was saved.
    return read_plan_file(out / PLAN_FILE).model_copy(update={"out": out})


def read_plan_file(file: Path) -> TrainingPlan:
    try:
        return TrainingPlan.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"plan: {file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise TrainingError(f"plan: {file} is not a plan: {error.errors()[0]['msg']}") from None
