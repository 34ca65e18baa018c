"""Runs a plan: data, tokenizer, model, transformers' Trainer, and at the end the record and the report.

Every checkpoint is whole, tokenizer and record included, so that it can be served the moment it is there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from .data import Data
from .examples import IGNORED, as_it_is
from .load import load_data, make_model
from .plan import PLAN_FILE, TrainingPlan
from .progress import Progress
from .record import make_record, write_card, write_record
from .report import write_report
from .sizes import check_it_fits
from .storage import ASIDE, FINAL, kept_whole, last_checkpoint, put_in_place

# Several processes, one for each GPU (accelerate launch), train one model; the first tells of it and writes.
IS_FIRST = os.environ.get("RANK", "0") == "0"
_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def train(plan: TrainingPlan, resume: bool = False) -> Path:
    """Train; the folder of the best checkpoint, with its record, card and report."""
    check_it_fits(plan)
    if not IS_FIRST:
        return _train(plan, resume)
    plan.out.mkdir(parents=True, exist_ok=True)
    with kept_whole(plan.out):
        (plan.out / PLAN_FILE).write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return _train(plan, resume)


def _train(plan: TrainingPlan, resume: bool) -> Path:
    torch.set_num_threads(plan.threads or len(os.sched_getaffinity(0)))
    set_seed(plan.seed)
    data = load_data(plan)
    model = make_model(plan, data.tokenizer)
    callbacks: list[TrainerCallback] = [Progress(plan, data), Recorder(plan, data)] if IS_FIRST else []
    if plan.patience:
        callbacks.append(EarlyStoppingCallback(plan.patience))
    trainer = Trainer(
        model=model,
        args=arguments(plan, data),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=as_it_is,
        compute_metrics=measure,
        preprocess_logits_for_metrics=best_ids,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )
    # The line of the log that it prints at the end is the progress bar's business.
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(plan.out) if resume else None)
    return _finish(plan, data, trainer)


def _finish(plan: TrainingPlan, data: Data, trainer: Trainer) -> Path:
    """The best checkpoint in a folder of its own, which appears complete."""
    aside = plan.out / ASIDE
    trainer.save_model(str(aside))
    if not IS_FIRST:
        return plan.out / FINAL
    state = trainer.state
    record = make_record(plan, data, trainer.model, state, state.best_global_step or state.global_step)
    if data.judge is not None:
        record["accuracy"] = data.judge(trainer.model.eval())
    write_record(aside, record)
    write_card(aside, data, record)
    write_report(aside, data, record, state.log_history, trainer.model.eval())
    # Its own settings, of no use to who loads it.
    (aside / "training_args.bin").unlink(missing_ok=True)
    return put_in_place(plan.out)


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Adds the record to every checkpoint when it has been saved: with it, it is complete."""

    def __init__(self, plan: TrainingPlan, data: Data) -> None:
        self._plan, self._data = plan, data

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **inside: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_record(folder, make_record(self._plan, self._data, inside["model"], state, state.global_step))


def arguments(plan: TrainingPlan, data: Data) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(plan.out),
        max_steps=plan.steps,
        per_device_train_batch_size=-(-plan.batch_size // _PROCESSES),
        per_device_eval_batch_size=max(plan.batch_size, 64),
        learning_rate=plan.learning_rate,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=plan.eval_steps,
        save_strategy="steps",
        save_steps=plan.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        # Not the share of exact answers: where many checkpoints have all of them, the loss still tells them apart.
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=max(1, plan.eval_steps // 20),
        seed=plan.seed,
        data_seed=plan.seed,
        use_cpu=not has_gpu,
        ddp_backend="gloo" if _PROCESSES > 1 and not has_gpu else None,
        bf16=plan.mixed_precision and has_gpu and torch.cuda.is_bf16_supported(),
        dataloader_num_workers=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        label_names=["labels"],
    )


def best_ids(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    found = logits[0] if isinstance(logits, tuple) else logits
    best: torch.Tensor = found.argmax(-1)
    return best


def measure(prediction: EvalPrediction) -> dict[str, float]:
    """How many tokens, and how many whole answers, greedy decoding gets right."""
    predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    asked = labels != IGNORED
    right = (predicted == labels) & asked
    return {
        "accuracy": float(right.sum() / max(asked.sum(), 1)),
        # All tokens right when the right ones before them are given: then greedy decoding gives them by itself.
        "exact": float((right == asked).all(axis=1).mean()),
    }
