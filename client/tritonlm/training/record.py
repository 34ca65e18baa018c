"""The record of a training next to its checkpoint: `training.json` and a model card. It trains nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerState

from .data import Data
from .plan import TrainingPlan

RECORD = "training.json"


def make_record(plan: TrainingPlan, data: Data, model: Any, state: TrainerState, step: int) -> dict[str, Any]:
    """The metrics and options of the training as of this step."""
    logs = [entry for entry in state.log_history if entry["step"] <= step]
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    evaluation: dict[str, Any] = next((entry for entry in reversed(logs) if "eval_loss" in entry), {})
    loss = evaluation.get("eval_loss")
    return {
        "step": step,
        "train_loss": losses[-1] if losses else None,
        "val_loss": loss,
        "val_perplexity": None if loss is None else math.exp(loss),
        "accuracy": evaluation.get("eval_exact") if data.accuracy and data.evaluate is None else None,
        "parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "seconds": evaluation.get("elapsed"),
        "seed": plan.seed,
        "dataset": plan.data,
        "train_examples": len(data.train),
        "held_out_examples": len(data.held_out),
        "model_type": plan.model or "gpt2",
        **({} if plan.lora is None else {"lora": plan.lora.model_dump(mode="json")}),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, data: Data, record: dict[str, Any]) -> None:
    accuracy = f"- {data.accuracy}: {record['accuracy']:.2%}\n" if record["accuracy"] is not None else ""
    made = "LoRA adapter" if "lora" in record else "causal language model"
    folder.joinpath("README.md").write_text(
        f"""---
license: apache-2.0
library_name: {"peft" if "lora" in record else "transformers"}
pipeline_tag: text-generation
---
# {data.name}

A {made} of {record["parameters"]:,} parameters ({record["model_type"]}), trained on
{data.description}.

- steps: {record["step"]:,} of {record["batch_size"]} sequences, {record["seconds"]:,.0f} s, seed {record["seed"]}
- validation loss {record["val_loss"]:.4f}, perplexity {record["val_perplexity"]:.3f}
{accuracy}
Made by `tritonlm train {record["dataset"]}`; `training.json` holds the record.
""",
        encoding="utf-8",
    )
