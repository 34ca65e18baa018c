"""A LoRA adapter on a model: which linear layers it changes. It knows PEFT, and nothing of data or files."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import TrainingError
from .plan import LoraOptions

# What the parts of attention are called in a module's path: self_attn, attention, attn.
_ATTENTION = "att"


def add_adapter(model: Any, options: LoraOptions) -> PeftModel:
    """The model with a new adapter, whose weights alone are trained. It changes nothing yet: B is zero."""
    layers = linear_layers(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_modules(list(layers), options.targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    return get_peft_model(model, config)


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers by path, without the output matrix, which is often the embedding."""
    output = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }


def target_modules(paths: list[str], targets: str | tuple[str, ...]) -> list[str]:
    """The names for PEFT, which takes every layer whose path ends in one."""
    if targets == "all":
        return sorted({path.rpartition(".")[2] for path in paths})
    if targets == "attention":
        # With the part before: GPT-2 calls layers of attention and of the MLP c_proj.
        names = {".".join(path.split(".")[-2:]) for path in paths if _ATTENTION in path.rpartition(".")[0]}
        if not names:
            raise TrainingError("lora.targets: no layer of this model lies in a part called attention; name the layers")
        return sorted(names)
    for name in targets:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            layers = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise TrainingError(f"lora.targets: {name} is no linear layer of this model; its layers are {layers}")
    return sorted(set(targets))
