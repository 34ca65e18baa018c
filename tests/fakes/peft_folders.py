"""Folders in PEFT's format, written without PEFT: two layers of small matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from engine.adapters.peft_files import CONFIG, WEIGHTS
from safetensors.torch import save

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PREFIX = "base_model.model."
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def tensors(rank: int = 4, **ranks: int) -> dict[str, torch.Tensor]:
    """Matrices of both layers; `q` and `down` have ranks of their own."""
    sizes = {Q: (ranks.get("q", rank), 6, 10), DOWN: (ranks.get("down", rank), 12, 5)}
    return {
        f"{PREFIX}{layer}.lora_{part}.weight": torch.arange(float(math.prod(shape))).reshape(shape) / 7
        for layer, (own, inputs, outputs) in sizes.items()
        for part, shape in {"A": (own, inputs), "B": (outputs, own)}.items()
    }


def write(folder: Path, config: object, weights: bytes | Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(weights if isinstance(weights, bytes) else save(dict(weights)))
    return folder
