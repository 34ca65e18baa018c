"""Runs a training plan: data, tokenizer, model, transformers' Trainer, then the record and the report.

Every checkpoint is complete, tokenizer and record included, so that it can be served as soon as it is written.
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
from .examples import IGNORED, identity_collator
from .load import load_data, make_model
from .packing import check_packing
from .plan import PLAN_FILE, TrainingPlan
from .progress import Progress
from .record import make_record, write_card, write_record
from .report import write_report
from .sizes import check_memory
from .storage import FINAL, STAGING, complete_checkpoints_only, last_checkpoint, publish_final

# Several processes (accelerate launch), one per GPU, train one model; only the first one logs and writes files.
IS_FIRST = os.environ.get("RANK", "0") == "0"
_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# Logits of an evaluation's batch. The loss takes as much again.
_EVAL_LOGITS_BYTES = 2**30


def train(plan: TrainingPlan, resume: bool = False) -> Path:
    """Train; return the folder of the best checkpoint, with its record, card and report."""
    check_memory(plan)
    if not IS_FIRST:
        return _train(plan, resume)
    plan.out.mkdir(parents=True, exist_ok=True)
    with complete_checkpoints_only(plan.out):
        (plan.out / PLAN_FILE).write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return _train(plan, resume)


def _train(plan: TrainingPlan, resume: bool) -> Path:
    torch.set_num_threads(plan.threads or len(os.sched_getaffinity(0)))
    set_seed(plan.seed)
    data = load_data(plan)
    model = make_model(plan, data.tokenizer)
    check_packing(model, data.train)
    callbacks: list[TrainerCallback] = [Progress(plan, data), Recorder(plan, data)] if IS_FIRST else []
    if plan.patience:
        callbacks.append(EarlyStoppingCallback(plan.patience))
    trainer = Trainer(
        model=model,
        args=arguments(plan, data),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=identity_collator,
        compute_metrics=accuracies,
        preprocess_logits_for_metrics=argmax_ids,
        # An adapter is served with its base's tokenizer.
        processing_class=None if plan.lora else data.tokenizer,
        callbacks=callbacks,
    )
    # Progress prints the log instead.
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(plan.out) if resume else None)
    return _finish(plan, data, trainer)


def _finish(plan: TrainingPlan, data: Data, trainer: Trainer) -> Path:
    """Write the best checkpoint, with record, card and report, to `final` atomically; return the folder."""
    staging = plan.out / STAGING
    trainer.save_model(str(staging))
    if not IS_FIRST:
        return plan.out / FINAL
    state = trainer.state
    record = make_record(plan, data, trainer.model, state, state.best_global_step or state.global_step)
    if data.evaluate is not None:
        record["accuracy"] = data.evaluate(trainer.model.eval())
    write_record(staging, record)
    write_card(staging, data, record)
    write_report(staging, data, record, state.log_history, trainer.model.eval())
    # The Trainer's arguments are not part of a checkpoint.
    (staging / "training_args.bin").unlink(missing_ok=True)
    return publish_final(plan.out)


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Adds the record to every saved checkpoint; a checkpoint with a record is complete."""

    def __init__(self, plan: TrainingPlan, data: Data) -> None:
        self._plan, self._data = plan, data

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_record(folder, make_record(self._plan, self._data, context["model"], state, state.global_step))


def arguments(plan: TrainingPlan, data: Data) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(plan.out),
        max_steps=plan.steps,
        per_device_train_batch_size=-(-plan.batch_size // _PROCESSES),
        per_device_eval_batch_size=_eval_batch_size(plan, data),
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
        # Not the exact-match accuracy: the loss still distinguishes checkpoints that all have 100 %.
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


def _eval_batch_size(plan: TrainingPlan, data: Data) -> int:
    """As many rows as their logits have memory for."""
    row = int(data.held_out.lengths.max()) * len(data.tokenizer) * 4
    return max(1, min(max(plan.batch_size, 64), _EVAL_LOGITS_BYTES // row))


def argmax_ids(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    scores = logits[0] if isinstance(logits, tuple) else logits
    ids: torch.Tensor = scores.argmax(-1)
    return ids


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """The shares of tokens and of whole sequences that greedy decoding predicts correctly."""
    predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    labelled = labels != IGNORED
    correct = (predicted == labels) & labelled
    return {
        "accuracy": float(correct.sum() / max(labelled.sum(), 1)),
        # A sequence whose tokens are all correct under teacher forcing is also what greedy decoding generates.
        "exact": float((correct == labelled).all(axis=1).mean()),
    }
