"""`tritonlm train`: trains a language model in this process, with a progress bar, into a folder that can be served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.contract.idle_threads import sleep_when_idle
from tritonlm.contract.imports import without_collections
from tritonlm.serving import ServingError, terminal

from .common import FAILED, MISUSED, AsJson, console, print_json

# rank=16. A path has a dot or a slash, and data of the Hub have a slash.
_OPTION = re.compile(r"[a-z_]+=")


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA [rank=16 alpha=32 targets=all dropout=0]",
            help="abacus, fable, a file, a folder, or a data set on the Hub; with --lora its options, too",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "--output_dir", help="folder for checkpoints and report")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "--model_type", help="checkpoint to train further; else from scratch")
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="train a LoRA adapter of --model: rank=16 alpha=32 targets=all dropout=0")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help="auto, keep, character or bpe")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="size of a tokenizer trained on the data")] = None,
    layers: Annotated[int | None, typer.Option(help="of a model from scratch")] = None,
    width: Annotated[int | None, typer.Option(help="of a model from scratch")] = None,
    heads: Annotated[int | None, typer.Option(help="of a model from scratch")] = None,
    context: Annotated[int | None, typer.Option(help="longest row in tokens; also of a model from scratch")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="several short examples in a row, kept apart")
    ] = None,
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
    for name in ("words", "lora", "resume", "as_json", "dataset", "plan_file"):
        options.pop(name)
    # Before torch is imported.
    sleep_when_idle()
    try:
        # Slow to import, and in an optional extra.
        with without_collections():
            from tritonlm.training.errors import TrainingError  # noqa: PLC0415
            from tritonlm.training.imports import without_unused_packages  # noqa: PLC0415
            from tritonlm.training.plan import read_plan, read_plan_file  # noqa: PLC0415

            with without_unused_packages():
                from tritonlm.training.run import IS_FIRST  # noqa: PLC0415
                from tritonlm.training.run import train as run  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        terminal.print_error(ServingError(f"{missing.name} is missing; pip install 'tritonlm[train]'"))
        raise typer.Exit(FAILED) from None
    try:
        options["data"], options["lora"] = _split(words or [], lora)
        options["data"] = options["data"] or dataset
        plan = read_plan_file(plan_file) if plan_file else read_plan(options, sizes, resume)
    except (TrainingError, _Misused) as error:
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
    use = f"serve --checkpoint {plan.out.name}={final}"
    if plan.lora:
        use = f"adapters add {plan.out.name} --base LM --path {final}"
    console.print(f"{final} is ready: tritonlm {use}", highlight=False, soft_wrap=True)


class _Misused(Exception):
    """One line: what is wrong with the words of the command."""


def _split(words: Sequence[str], lora: bool) -> tuple[str | None, dict[str, str] | None]:
    """The data, and with `--lora` its options: the words NAME=VALUE. Their values are checked with the plan."""
    options = dict(word.split("=", 1) for word in words if _OPTION.match(word))
    data = [word for word in words if not _OPTION.match(word)]
    if options and not lora:
        raise _Misused(f"lora: {next(iter(options))}=… is an option of --lora; give --lora, too")
    if len(data) > 1:
        raise _Misused(f"data: name one thing to train on, not {len(data)}: {' '.join(data)}")
    return (data[0] if data else None), (options if lora else None)
