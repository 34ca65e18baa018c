"""What a GGUF file's checkpoint folder holds. It does not know where the folder lies."""

from __future__ import annotations

import json
from pathlib import Path

from tritonlm.contract import gguf_tensors

from .architectures import config_of, tensors_of
from .model_file import ModelFile
from .tokenizer import write_tokenizer


def write_contents(folder: Path, model: ModelFile, files: list[Path]) -> None:
    count = len(files)
    names = {
        part: "model.gguf" if count == 1 else f"model-{number:05}-of-{count:05}.gguf"
        for number, part in enumerate(files, 1)
    }
    config = config_of(model)
    gguf_tensors.write(folder, tensors_of(model, names))
    write_tokenizer(folder, model, config["vocab_size"])
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    for part, name in names.items():
        (folder / name).symlink_to(part)
