"""The training plan: names, ranges, defaults and descriptions of all options, defined once.

The plan is saved next to the checkpoints, so that an interrupted training resumes with the same options. This module
reads no training data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import TrainingError

PLAN_FILE = "plan.json"
# A layer's name, or the end of its path: q_proj, attn.c_proj.
TargetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


class Sizes(BaseModel):
    """The dimensions of a GPT-2 that is trained from scratch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(default=4, ge=1, le=96)
    width: int = Field(default=256, ge=16, le=8192)
    heads: int = Field(default=4, ge=1, le=128)
    context: int = Field(default=512, ge=8, le=32_768)


class LoraOptions(BaseModel):
    """A LoRA adapter: which linear layers of the base get low-rank matrices, and of which rank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, le=256, description="inner size of the low-rank matrices")
    alpha: float = Field(32, gt=0, le=65_536, description="the matrices' product is scaled by alpha / rank")
    targets: Literal["all", "attention"] | tuple[TargetName, ...] = Field(
        "all", description="all linear layers, those of attention, or names such as q_proj,v_proj"
    )
    dropout: float = Field(0, ge=0, lt=1, description="share of a layer's inputs that a step leaves out")

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Names may come as one text, separated by commas, as on the command line."""
        if not isinstance(value, str) or value in ("all", "attention"):
            return value
        return tuple(name.strip() for name in value.split(","))

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if not value:
            raise ValueError("name at least one layer")
        return value


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
    lora: LoraOptions | None = Field(None, description="train a LoRA adapter of the model, not its own weights")
    sizes: Sizes = Field(
        default_factory=Sizes, description="of a model from scratch; context is also the longest row of any training"
    )
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
    packing: bool = Field(False, description="several short examples in one row, which attention keeps apart")
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
        plan = TrainingPlan(**{**PRESETS.get(str(options.get("data")), {}), **options})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise TrainingError(f"{field}: {problem['msg']} (got {problem['input']!r:.60})") from None
    _check_lora(plan)
    return plan


def _check_lora(plan: TrainingPlan) -> None:
    """An adapter needs a base, whose tokenizer it keeps."""
    if plan.lora is None:
        return
    if plan.model is None:
        raise TrainingError("lora: an adapter needs a base; name it with model")
    if plan.data in PRESETS:
        raise TrainingError(f"lora: an adapter keeps its base's tokenizer, and {plan.data} has its own; use other data")
    if plan.tokenizer not in ("auto", "keep"):
        raise TrainingError(f"tokenizer: an adapter keeps its base's tokenizer; leave out {plan.tokenizer}")


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
    set_sizes = {name: value for name, value in sizes.items() if value is not None}
    of_model = set_sizes.keys() - {"context"}
    if of_model and options.get("model") is not None:
        raise TrainingError(f"{min(of_model)}: --model sets the sizes; leave this option out")
    if set_sizes:
        options = {**options, "sizes": with_sizes(str(options["data"]), set_sizes)}
    return make_plan(**{**options, "out": Path(out or f"runs/{Path(str(options['data'])).stem}")})


def with_sizes(data: str, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes that are set, with those of the data's preset as defaults."""
    preset: Sizes = PRESETS.get(data, {}).get("sizes", Sizes())
    return {**preset.model_dump(), **sizes}


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
