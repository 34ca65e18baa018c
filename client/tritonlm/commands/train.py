"""`tritonlm train`: trains a language model in this process, with a progress bar, into a folder that can be served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.serving import ServingError, terminal

from .common import FAILED, MISUSED, AsJson, console, print_json


def train(
    data: Annotated[
        str | None,
        typer.Argument(help="abacus, fable, a file, a folder, or a data set on the Hub"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "--output_dir", help="folder for checkpoints and report")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "--model_type", help="checkpoint to train further; else from scratch")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="auto, keep, character or bpe")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="size of a tokenizer trained on the data")] = None,
    layers: Annotated[int | None, typer.Option(help="of a model from scratch")] = None,
    width: Annotated[int | None, typer.Option(help="of a model from scratch")] = None,
    heads: Annotated[int | None, typer.Option(help="of a model from scratch")] = None,
    context: Annotated[int | None, typer.Option(help="of a model from scratch; longest row in tokens")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--max_iters", help="optimizer steps")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "--batch_size", help="sequences per step")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--learning_rate", help="peak value")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="steps until the peak is reached")] = None,
    eval_steps: Annotated[
        int | None, typer.Option("--eval-steps", "--eval_interval", help="steps between evaluations and checkpoints")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="stop after this many evaluations without progress")] = None,
    examples: Annotated[int | None, typer.Option(help="number of stories that fable generates")] = None,
    seed: Annotated[int | None, typer.Option(help="same seed, same weights")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: one per core")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume the training in --out")] = False,
    dataset: Annotated[str | None, typer.Option("--dataset", hidden=True)] = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", hidden=True, help="a job's plan, as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a language model; every checkpoint can be served at once (tritonlm add, serve --checkpoint)."""
    options: dict[str, Any] = dict(locals())
    sizes = {name: options.pop(name) for name in ("layers", "width", "heads", "context")}
    for name in ("resume", "as_json", "dataset", "plan_file"):
        options.pop(name)
    options["data"] = data or dataset
    # Set before torch is imported: spinning OpenMP threads slow down other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        # Slow to import, and in an optional extra.
        from tritonlm.training.errors import TrainingError  # noqa: PLC0415
        from tritonlm.training.plan import read_plan, read_plan_file  # noqa: PLC0415
        from tritonlm.training.run import IS_FIRST  # noqa: PLC0415
        from tritonlm.training.run import train as run  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        terminal.print_error(ServingError(f"{missing.name} is missing; pip install 'tritonlm[train]'"))
        raise typer.Exit(FAILED) from None
    try:
        plan = read_plan_file(plan_file) if plan_file else read_plan(options, sizes, resume)
    except TrainingError as error:
        terminal.print_error(error)
        raise typer.Exit(MISUSED) from None
    try:
        final = run(plan, resume)
    except (TrainingError, OSError) as error:
        terminal.print_error(error)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        terminal.say(f"stopped; resume with: tritonlm train --resume --out {plan.out}")
        raise typer.Exit(130) from None
    if not IS_FIRST:
        return
    if as_json:
        print_json({"checkpoint": str(final)})
        return
    console.print(
        f"{final} is ready: tritonlm serve --checkpoint {plan.out.name}={final}", highlight=False, soft_wrap=True
    )
