"""The progress display of a training: a bar with loss, tokens per second and time left; plain lines in a log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data import Data
from .plan import TrainingPlan


class Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, plan: TrainingPlan, data: Data) -> None:
        self._plan = plan
        self._console = Console(stderr=True)
        mean = float(data.train.lengths[:10_000].mean())
        self._tokens_per_step = plan.batch_size * mean
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"), TimeRemainingColumn(), console=self._console,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(data.name, total=plan.steps, loss="–", speed="–")
        self._started, self._first_step, self._elapsed_before = time.monotonic(), 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        self._elapsed_before = max((entry.get("elapsed", 0.0) for entry in state.log_history), default=0.0)
        self._bar.start()
        self._bar.update(self._task, completed=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The record reads the elapsed time from the log; a resumed training continues the count.
        state.log_history[-1]["elapsed"] = round(self._elapsed_before + time.monotonic() - self._started, 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        metrics = logs or {}
        steps = state.global_step - self._first_step
        speed = self._tokens_per_step * steps / max(time.monotonic() - self._started, 1e-9)
        if "loss" in metrics:
            self._bar.update(self._task, loss=f"{metrics['loss']:.4f}", speed=f"{speed:,.0f}")
            self._print(state, f"loss {metrics['loss']:.4f}, {speed:,.0f} tokens/s")
        if "eval_loss" in metrics:
            accuracy = f", exact {metrics['eval_exact']:.4f}" if "eval_exact" in metrics else ""
            self._print(state, f"held out: loss {metrics['eval_loss']:.4f}{accuracy}", always=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.stop()

    def _print(self, state: TrainerState, message: str, always: bool = False) -> None:
        if always or not self._console.is_terminal:
            self._console.print(f"step {state.global_step} of {self._plan.steps}: {message}", highlight=False)
