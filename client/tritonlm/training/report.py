"""The report at the end of a training, next to the checkpoint: a loss plot, sample outputs, accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from .data import Data

_SAMPLE_TOKENS = 220


def write_report(folder: Path, data: Data, record: dict[str, Any], logs: list[dict[str, Any]], model: Any) -> None:
    plot_losses(folder / "loss.png", data.name, logs)
    lines = [f"# {data.name}: report", "", "![loss](loss.png)", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in record.items() if value is not None]
    if data.accuracy:
        lines += ["", f"Accuracy is the share of {data.accuracy}."]
    lines += ["", "## Samples (greedy)", ""]
    for prompt in data.prompts:
        lines += ["```text", f"{prompt} → {sample(model, data.tokenizer, prompt)}", "```", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def plot_losses(file: Path, name: str, logs: list[dict[str, Any]]) -> None:
    # Slow to import, and pyplot, which manages windows, more so.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogFormatter  # noqa: PLC0415

    class PlainLabels(LogFormatter):
        """0.5 instead of 5·10⁻¹: matplotlib's parser of formulas takes about as long as all else that is drawn."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[key]) for entry in logs if key in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], label=label)
    axes.set(title=name, xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.yaxis.set_major_formatter(PlainLabels())
    axes.yaxis.set_minor_formatter(PlainLabels(labelOnlyBase=False))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


@torch.inference_mode()
def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    available = model.config.max_position_embeddings - ids.shape[1]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(_SAMPLE_TOKENS, available), do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text
