"""Adapters of random matrices that PEFT itself has written, and PEFT's own outputs with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter

ALL = "all-linear"


def write_adapter(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Save an adapter whose matrices A and B are both random. Its effect on the logits is large."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, matrix in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(matrix, std=0.5 / (matrix.shape[1] if ".lora_A." in name else 1) ** 0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def add(file: Path, **folders: Path) -> None:
    for name, folder in folders.items():
        add_adapter(file, name.replace("_", "-"), AdapterEntry(str(folder)), replace=True)


class PeftReference:
    """The same by transformers and PEFT, in float32."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._model = peft.PeftModel.from_pretrained(model, adapter).eval() if adapter else model

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Of every next token after each of these: (ids, vocabulary)."""
        logits: torch.Tensor = self._model(input_ids=torch.tensor([list(ids)])).logits[0]
        return logits.double().log_softmax(-1)

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int]) -> torch.Tensor:
        """The last hidden states: (ids, width)."""
        states: torch.Tensor = self._model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
        return states[-1][0]
