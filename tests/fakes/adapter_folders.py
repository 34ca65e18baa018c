"""Folders that look like adapters in PEFT's format; their weights are no tensors."""

from __future__ import annotations

import json
from pathlib import Path


def adapter_folder(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder
